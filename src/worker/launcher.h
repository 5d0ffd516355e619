/*-------------------------------------------------------------------------
 *
 * launcher.h
 *		The launcher.  See launcher.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_LAUNCHER_H
#define OMNI_LAUNCHER_H



extern void omni_launcher_register(void);

#endif							/* OMNI_LAUNCHER_H */
