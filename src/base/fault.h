/*-------------------------------------------------------------------------
 *
 * fault.h
 *		Fault points: where a test can order an error.  See fault.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_FAULT_H
#define OMNI_FAULT_H

#ifdef USE_ASSERT_CHECKING
extern void omni_fault_point(const char *name);
#define OMNI_FAULT_POINT(name) omni_fault_point(name)
#else
#define OMNI_FAULT_POINT(name) ((void) 0)
#endif

#endif							/* OMNI_FAULT_H */
