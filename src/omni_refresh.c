/*-------------------------------------------------------------------------
 *
 * omni_refresh.c
 *		Loading of the library.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "miscadmin.h"

#include "base/compat.h"
#include "base/setting.h"
#include "omni_refresh.h"
#include "worker/launcher.h"

PG_MODULE_MAGIC_EXT(.name = OMNI_EXTENSION,.version = OMNI_REFRESH_VERSION);

PGDLLEXPORT void _PG_init(void);

void
_PG_init(void)
{
	omni_settings_define();
	omni_is_preloaded = process_shared_preload_libraries_in_progress;
	if (process_shared_preload_libraries_in_progress && !IsBinaryUpgrade)
		omni_launcher_register();
}
