/*-------------------------------------------------------------------------
 *
 * once.h
 *		What a transaction has asked for already.  See once.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_ONCE_H
#define OMNI_ONCE_H

#include "store/job.h"

extern bool omni_once_find(const OmniRequest *request, Datum *row);
extern void omni_once_remember(const OmniRequest *request, Datum row,
							   const OmniRowVersion *version);
extern void omni_once_forget_resets(const OmniRequest *refresh);

#endif							/* OMNI_ONCE_H */
