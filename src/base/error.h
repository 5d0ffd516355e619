/*-------------------------------------------------------------------------
 *
 * error.h
 *		Errors as plain data.  See error.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_ERROR_H
#define OMNI_ERROR_H

#include "utils/palloc.h"

/*
 * An error as plain data, with ereport's fields: the worker makes it, copies it through
 * shared memory, and the caller raises it.  Longer texts are clipped.  Texts from outside
 * must not hold the API key: see quote() in api.c.
 */
typedef struct OmniError
{
	int			sqlstate;		/* 0 means no error */
	char		message[512];
	char		detail[1024];	/* may be empty */
	char		hint[512];		/* may be empty */
} OmniError;

extern void omni_error_set(OmniError *error, int sqlstate,
						   const char *format,...) pg_attribute_printf(3, 4);
extern void omni_error_detail(OmniError *error,
							  const char *format,...) pg_attribute_printf(2, 3);
extern void omni_error_hint(OmniError *error,
							const char *format,...) pg_attribute_printf(2, 3);
extern void omni_error_catch(OmniError *error, MemoryContext context);
extern bool omni_error_try(void (*function) (void), OmniError *error);
extern void omni_error_report(const OmniError *error, int elevel);
extern char *omni_error_text(const OmniError *error);

#endif							/* OMNI_ERROR_H */
