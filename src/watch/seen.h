/*-------------------------------------------------------------------------
 *
 * seen.h
 *		Watches, and what they remember.  See seen.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_SEEN_H
#define OMNI_SEEN_H

#include "access/transam.h"
#include "nodes/pg_list.h"

#include "omni/api.h"
#include "watch/difference.h"

/* The OID after which relations are looked at: those before it are the system's */
#define OMNI_SEEN_START		(FirstNormalObjectId - 1)

/* A watch, as its row has it */
typedef struct OmniWatch
{
	pg_uuid_t	id;
	OmniRequest request;		/* server, model, branch and requester;
								 * policy, if any, is the one to reset */
	ArrayType  *schemas;		/* NULL: all but those of the system */
	int64		delay;			/* in microseconds */
	int64		removals;		/* likewise, or -1: never */
	int64		quiet;			/* likewise; not without a policy */
	Oid			database;

	/* the refresh to ask for next */
	bool		owes;
	bool		owes_hard;
	ArrayType  *owed_schemas;	/* NULL: the whole model */
	ArrayType  *owed_tables;	/* NULL: all of the schemas */

	/* the one that was asked for last */
	int64		job;			/* or 0 */
	bool		unfinished;
	int			failures;		/* in a row */

	/* the data that the last reset is for: see omni_watch_data() */
	bool		has_data;
	int64		data;

	bool		triggered;		/* the event trigger is enabled */
} OmniWatch;

/* A relation that Omni was told of */
typedef struct OmniSeen
{
	char	   *schema;
	char	   *relation;
	bool		leaf;
	bool		gone;			/* there is none of that name any more */
} OmniSeen;

/* the watches */
extern List *omni_watches(void);
extern bool omni_watch_find(const OmniRequest *request, OmniWatch *watch);
extern bool omni_watch_read(const pg_uuid_t *id, OmniWatch *watch);
extern Datum omni_watch_add(const OmniWatch *watch, Interval *delay, Interval *removals,
							Interval *quiet);
extern void omni_watch_owe(OmniWatch *watch, const char *schema, const char *relation);
extern void omni_watch_owe_all(OmniWatch *watch, bool hard);
extern void omni_watch_write(const OmniWatch *watch);
extern bool omni_watch_data(const pg_uuid_t *id, int64 *data, int64 *seen, bool *is_new);
extern void omni_watch_delete(const OmniWatch *watch);
extern void omni_watch_delete_copies(const OmniWatch *watch);
extern bool omni_watch_any(void);
extern bool omni_watch_is_active(const OmniWatch *watch);
extern Oid	omni_watch_owner(void);
extern void omni_watch_lock(void);
extern bool omni_watch_try_lock(void);
extern void omni_watch_enable_trigger(bool enable);

/* what a watch remembers */
extern Oid	omni_seen_window(Oid after, int count);
extern List *omni_seen_differences(const OmniWatch *watch, Oid after, Oid to);
extern List *omni_seen_relations(const OmniWatch *watch, const OmniSeen *after, int count);
extern void omni_seen_count(const OmniWatch *watch, int *relations, int *gone);
extern void omni_seen_begin(const OmniWatch *watch);
extern void omni_seen_remember(const OmniWatch *watch, const OmniDifference *difference,
							   const OmniShape *shape);
extern void omni_seen_forget(const OmniWatch *watch, const OmniSeen *relation);
extern void omni_seen_forget_all(const OmniWatch *watch);

#endif							/* OMNI_SEEN_H */
