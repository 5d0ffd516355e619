/*-------------------------------------------------------------------------
 *
 * fault.c
 *		Fault points: where a test can order an error.
 *
 * A step that can raise an error, for lack of memory for example, ends with a fault point.  So
 * a test can see what becomes of a job if that happens.  Only a library that is compiled with
 * assertions has them.
 *
 * The file "omni_refresh.fault.OID" in the data directory, with the OID of a database, orders
 * one error: it holds an SQLSTATE, how often the fault point is to be passed, and its name.  It
 * is removed when the error is raised.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <unistd.h>

#include "miscadmin.h"

#include "base/fault.h"

#ifdef USE_ASSERT_CHECKING

/* Raise the error that a test has ordered for a fault point, if any. */
void
omni_fault_point(const char *name)
{
	char		path[64];
	char		sqlstate[6];
	char		wanted[64];
	int			passes;
	bool		ordered;
	FILE	   *file;

	snprintf(path, sizeof(path), "omni_refresh.fault.%u", MyDatabaseId);
	file = fopen(path, "r+");
	if (file == NULL)
		return;
	ordered = fscanf(file, "%5s %d %63[^\n]", sqlstate, &passes, wanted) == 3 &&
		strcmp(wanted, name) == 0;
	if (ordered && passes > 1)
	{
		rewind(file);
		fprintf(file, "%s %d %s\n", sqlstate, passes - 1, wanted);
	}
	fclose(file);
	if (!ordered || passes > 1)
		return;
	unlink(path);
	ereport(ERROR,
			(errcode(MAKE_SQLSTATE(sqlstate[0], sqlstate[1], sqlstate[2], sqlstate[3], sqlstate[4])),
			 errmsg("fault point \"%s\"", name)));
}

#endif
