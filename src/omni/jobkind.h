/*-------------------------------------------------------------------------
 *
 * jobkind.h
 *		The kinds of jobs: what Omni can be asked to do.  See jobkind.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_JOBKIND_H
#define OMNI_JOBKIND_H

typedef enum OmniKind
{
	OMNI_KIND_SCHEMA,			/* refresh a model of the schema */
	OMNI_KIND_CACHE,			/* reset a cache policy */
	OMNI_KIND_DBT,				/* compile dbt's manifest anew */
	OMNI_KIND_UNRECOGNIZED		/* the kind in a row is none of these */
} OmniKind;

/* A hint for an HTTP status */
typedef struct OmniHint
{
	int			status;			/* 0 ends a list */
	const char *hint;
} OmniHint;

/* What differs between the kinds of jobs */
typedef struct OmniJobKind
{
	const char *name;			/* as the tables have it */
	const char *function;		/* the SQL function that requests it at once;
								 * NAME_on_commit queues it */
	const char *path;			/* of its URL, behind the model's */

	/* what it takes besides the model */
	bool		takes_extent;	/* hard, schemas and tables */
	bool		takes_branch;
	bool		needs_branch;	/* always */
	bool		takes_policy;	/* in the path; and reset_at in the body */

	bool		is_followed;	/* Omni answers with the id of a job of its
								 * own, which is polled */
	bool		holds_resets;	/* later resets of the model wait for its end */

	/* messages, with the server's name as argument */
	const char *refused;		/* and with the HTTP status */
	const char *failed;			/* Omni has accepted it, and could not do it */
	const char *failed_hint;
	OmniHint	hints[4];		/* where they differ from those of any request */
} OmniJobKind;

extern const OmniJobKind omni_job_kinds[];
extern OmniKind omni_kind_find(const char *name);

#endif							/* OMNI_JOBKIND_H */
