/*-------------------------------------------------------------------------
 *
 * omni_refresh.h
 *		The names of the extension.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_REFRESH_H
#define OMNI_REFRESH_H

/* Defined by the Makefile from the control file */
#ifndef OMNI_REFRESH_VERSION
#error "OMNI_REFRESH_VERSION is not defined"
#endif

#define OMNI_EXTENSION "omni_refresh"	/* also the name of the FDW */

#endif							/* OMNI_REFRESH_H */
