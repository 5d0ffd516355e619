/*-------------------------------------------------------------------------
 *
 * report.h
 *		What the worker tells in the server's log.  See report.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_REPORT_H
#define OMNI_REPORT_H

#include "worker/inflight.h"

extern void omni_report_begin(void);
extern void omni_report_finished(const OmniWork *work);
extern void omni_report_settling(void);
extern void omni_report_add_settled(const OmniJob *job, const OmniOutcome *outcome);
extern void omni_report_settled(void);
extern void omni_report_left_out(void);

#endif							/* OMNI_REPORT_H */
