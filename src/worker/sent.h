/*-------------------------------------------------------------------------
 *
 * sent.h
 *		Queued requests that were sent lately.  See sent.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_SENT_H
#define OMNI_SENT_H

#include "store/job.h"

extern void omni_sent_recall(void);
extern void omni_sent_note(int64 merge_key);
extern int64 omni_sent_wait(const OmniJob *job);
extern void omni_sent_forget(void);

#endif							/* OMNI_SENT_H */
