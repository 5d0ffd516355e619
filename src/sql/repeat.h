/*-------------------------------------------------------------------------
 *
 * repeat.h
 *		Find calls that one statement repeats.  See repeat.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_REPEAT_H
#define OMNI_REPEAT_H

#include "fmgr.h"

#include "omni/api.h"

extern bool omni_call_is_repeated(FmgrInfo *flinfo, const OmniRequest *request);

#endif							/* OMNI_REPEAT_H */
