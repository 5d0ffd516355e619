/*-------------------------------------------------------------------------
 *
 * jobkind.c
 *		The kinds of jobs: what Omni can be asked to do, one row each.
 *
 * To add one, add it to OmniKind and a row here, its pair of functions to refresh.c and to the
 * script, and its name to the constraint on omni_refresh_job.kind there.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "omni/jobkind.h"

const OmniJobKind omni_job_kinds[] = {
	[OMNI_KIND_SCHEMA] = {
		.name = "schema",
		.function = "omni_refresh",
		.path = "refresh",
		.takes_extent = true,
		.takes_branch = true,
		.is_followed = true,
		.holds_resets = true,
		.refused = "server \"%s\" refused the refresh: HTTP status %d",
		.failed = "Omni could not refresh the model on server \"%s\"",
		.failed_hint = "Look at the connection in Omni: it may not reach the database, or lack privileges there.",
		.hints = {
			{400, "Check the arguments; branch is required when the connection's setting \"Branch-based schema refresh\" is on, and must be left out when it is off."},
			{403, "Modelers may refresh only on connections with exactly one shared model; Connection Admins on every connection they administer."},
			{404, "Check the model's uuid, and that the server's \"base_url\" is the instance that has it."}
		}
	},
	[OMNI_KIND_CACHE] = {
		.name = "cache",
		.function = "omni_refresh_cache",
		.path = "cache_reset",
		.takes_policy = true,
		.refused = "server \"%s\" refused the cache reset: HTTP status %d",
		.failed = "Omni could not reset the cache policy on server \"%s\""
	},
	[OMNI_KIND_DBT] = {
		.name = "dbt",
		.function = "omni_refresh_dbt_sync",
		.path = "dbt-sync",
		.takes_branch = true,
		.needs_branch = true,
		.is_followed = true,
		.holds_resets = true,
		.refused = "server \"%s\" refused the dbt sync: HTTP status %d",
		.failed = "Omni could not sync dbt for the model on server \"%s\"",
		.failed_hint = "Look at the dbt settings of the connection in Omni: dbt may have failed, or Omni may not reach its repository.",
		.hints = {
			{404, "Check the uuids of model and branch, and that the server's \"base_url\" is the instance that has them."},
			{405, "The connection of the model has no dbt: set it up in Omni."},
			{422, "dbt itself has failed: look at the dbt settings of the connection in Omni, and at the project."}
		}
	},
	[OMNI_KIND_UNRECOGNIZED] = {
		.name = "unrecognized",
		.function = "omni_refresh",
		.path = "",
		.refused = "",
		.failed = ""
	}
};

/* Find a kind by the name that a row has. */
OmniKind
omni_kind_find(const char *name)
{
	OmniKind	kind = 0;

	while (kind < OMNI_KIND_UNRECOGNIZED && strcmp(omni_job_kinds[kind].name, name) != 0)
		kind++;
	return kind;
}
