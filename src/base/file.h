/*-------------------------------------------------------------------------
 *
 * file.h
 *		Files that options name.  See file.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_FILE_H
#define OMNI_FILE_H

#include "c.h"

extern void omni_file_explain_denial(const char *path, char *text, size_t size);
extern bool omni_file_has_certificate(const char *path, char *text, size_t size);

#endif							/* OMNI_FILE_H */
