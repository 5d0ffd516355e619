/*-------------------------------------------------------------------------
 *
 * attempt.h
 *		The steps of an attempt.  See attempt.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_ATTEMPT_H
#define OMNI_ATTEMPT_H

extern bool omni_attempts_begin(void);
extern void omni_attempts_send(void);
extern void omni_attempts_record(void);

#endif							/* OMNI_ATTEMPT_H */
