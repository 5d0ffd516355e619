/*-------------------------------------------------------------------------
 *
 * kind.h
 *		The kinds of work.  See kind.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_KIND_H
#define OMNI_KIND_H

#include "worker/inflight.h"

extern const OmniWorkKind omni_call_kind;
extern const OmniWorkKind omni_queued_kind;
extern const OmniWorkKind omni_poll_kind;
extern const OmniWorkKind omni_lookup_kind;

/* in kind.c */
extern void omni_kind_consider_retry(OmniWork *work);
extern void omni_kind_keep_telling_error(OmniWork *work, const OmniAnswer *answer);
extern char *omni_kind_job_url(const OmniWork *work);
extern bool omni_kind_job_begin(OmniWork *work);
extern void omni_kind_job_delay(OmniWork *work, int64 wait);
extern void omni_kind_job_refuse(OmniWork *work);
extern void omni_kind_job_judge(OmniWork *work, const OmniAnswer *answer);

#endif							/* OMNI_KIND_H */
