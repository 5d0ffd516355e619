/*-------------------------------------------------------------------------
 *
 * setting.h
 *		The settings, omni_refresh.*.  See setting.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_SETTING_H
#define OMNI_SETTING_H

#include "c.h"

extern bool omni_is_preloaded;
extern char *omni_server;
extern int	omni_on_failure;
extern int	omni_call_timeout;
extern bool omni_enabled;
extern int	omni_idle_timeout;
extern int	omni_min_interval;
extern int	omni_retry_for;
extern int	omni_max_in_flight;
extern bool omni_track;
extern int	omni_track_timeout;
extern int	omni_retention;

#define OMNI_ON_FAILURE_ERROR	0
#define OMNI_ON_FAILURE_WARNING 1

extern void omni_settings_define(void);

#endif							/* OMNI_SETTING_H */
