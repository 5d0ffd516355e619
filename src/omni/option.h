/*-------------------------------------------------------------------------
 *
 * option.h
 *		The options of servers and user mappings.  See option.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_OPTION_H
#define OMNI_OPTION_H

#include "utils/uuid.h"

#include "base/error.h"

/* Where and how to reach Omni: the options of a server and a user mapping */
typedef struct OmniTarget
{
	char	   *base_url;
	char	   *ca_file;		/* NULL: the system's */
	char	   *proxy;			/* NULL: none */
	int			connect_timeout;	/* ms */
	int			timeout;		/* ms, of one attempt */
	int			rate_limit;		/* requests a minute, 0 means no limit */

	/* what a request takes that leaves it out; NULL: nothing */
	pg_uuid_t  *model;
	pg_uuid_t  *branch;
	char	   *cache_policy;	/* shorter than OMNI_MAX_POLICY */

	char	   *key_file;		/* NULL: key is set */
	char	   *key;
} OmniTarget;

extern bool omni_target_find(const char *servername, Oid role,
							 OmniTarget *target, OmniError *error);
extern bool omni_target_read_key(OmniTarget *target, OmniError *error);

#endif							/* OMNI_OPTION_H */
