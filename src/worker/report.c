/*-------------------------------------------------------------------------
 *
 * report.c
 *		What the worker tells in the server's log: jobs that end badly without a caller who
 *		hears of it, and outages of servers.
 *
 * A job that ends "failed" or "unknown" is one line.  An outage is one line when it begins and
 * one when it ends.  It begins with the first attempt for a queued job, or poll, to which a
 * server does not answer, or not as Omni does, or with a status of 500 or above; it ends with
 * the next answer.
 *
 * The lines of a minute are limited.  Each role has a share, and half of the lines are for
 * those roles that have had none in this minute, so that a flood of failures of one role does
 * not hide the first failure of another.  The ends of outages have a limit of their own.  At the
 * end of the minute, a line says how many were left out.
 *
 * Names and the texts of errors come from users and from outside.  Write each line without
 * control characters, and names in quotes, which are doubled in them, so that a text cannot
 * look like another fact or another line.  The API key was removed when the error was made.
 *
 * Times are those of omni_clock().
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "lib/stringinfo.h"
#include "storage/ipc.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/uuid.h"

#include "base/clock.h"
#include "base/status.h"
#include "worker/report.h"

/* The lines of a minute: in all, of a role, and about ends of outages, which come on top */
#define MINUTE				OMNI_MS(60 * 1000)
#define MAX_LINES			12
#define MAX_LINES_OF_ROLE	4
#define MAX_ENDS			12

/* Forget an outage after this time without an attempt */
#define FORGET_OUTAGE		OMNI_MS(60 * 60 * 1000)

/* A role that has had lines in this minute */
typedef struct Share
{
	Oid			role;
	int			lines;
} Share;

/* A server that is, or was a while ago, in an outage */
typedef struct Outage
{
	NameData	server;
	bool		lasts;
	bool		told;			/* there is a line about its beginning */
	int64		began;
	int64		told_at;		/* the last line about a beginning, or 0 */
	int64		last;			/* the last failed attempt */
	int			failures;		/* attempts */
} Outage;

/* The end of a job that an earlier worker has left behind */
typedef struct Settled
{
	Oid			role;
	int			sqlstate;
	char	   *line;
} Settled;

/* The lines of this minute, the outages, and the settled jobs to report */
typedef struct Report
{
	/* this minute, which begins with its first line, written or not */
	int64		minute_ends;
	int			lines;
	int			ends;
	int			left_out;
	Share		shares[MAX_LINES];
	int			nshares;

	List	   *outages;		/* of Outage, in TopMemoryContext */

	/* jobs that a transaction has settled and not committed yet */
	MemoryContext settled_context;
	List	   *settled;		/* of Settled, in settled_context */
	int			more_settled;	/* than the share of their role */
} Report;

static Report report;

static void at_exit(int code, Datum arg);
static bool is_bad_end(const OmniOutcome *outcome);
static bool has_waiting_caller(int64 job);
static char *describe_job(const OmniJob *job, const OmniOutcome *outcome);
static const OmniError *error_of(const OmniOutcome *outcome);
static void append_error(StringInfo line, const OmniError *error);
static void append_name(StringInfo line, const char *name);
static char *one_line(StringInfo line);
static void note_server(const OmniWork *work);
static Outage *find_outage(const NameData *server);
static void forget_outages(void);
static void begin_outage(Outage *outage, const OmniWork *work);
static void end_outage(Outage *outage);
static bool tell(Oid role, int sqlstate, const char *line);
static void leave_out(int lines);
static void begin_minute(void);
static bool take_line(Oid role);

/* Begin in a new worker. */
void
omni_report_begin(void)
{
	report.settled_context = AllocSetContextCreate(TopMemoryContext, "omni_refresh report",
												   ALLOCSET_SMALL_SIZES);
	before_shmem_exit(at_exit, (Datum) 0);
}

/* before_shmem_exit callback: do not wait for the end of the minute, or for listeners. */
static void
at_exit(int code, Datum arg)
{
	if (omni_notify_left(NULL) > 0)
		ereport(LOG,
				(errmsg("the background worker of omni_refresh ends before it could notify listeners, notices dropped: %d",
						omni_notify_left(NULL))));
	report.minute_ends = 0;
	omni_report_left_out();
}

/* Report what has become of some work in an attempt, once that is committed. */
void
omni_report_finished(const OmniWork *work)
{
	const OmniOutcome *outcome = &work->outcome;
	char	   *line;

	if (work->transfer != NULL)
		note_server(work);
	if (!work->kind->has_job || work->row != OMNI_ROW_OURS || !is_bad_end(outcome) ||
		(work->kind->has_caller && !omni_work_is_abandoned(work)))
		return;
	line = describe_job(&work->job, outcome);
	(void) tell(work->job.request.role, error_of(outcome)->sqlstate, line);
	pfree(line);
}

/* A transaction begins to settle jobs; one that did before has failed, or is reported. */
void
omni_report_settling(void)
{
	MemoryContextReset(report.settled_context);
	report.settled = NIL;
	report.more_settled = 0;
}

/* Remember a job that this transaction has settled, unless its caller is about to hear of it. */
void
omni_report_add_settled(const OmniJob *job, const OmniOutcome *outcome)
{
	MemoryContext context;
	Settled    *new;
	int			of_role = 0;
	ListCell   *cell;

	if (!is_bad_end(outcome) || has_waiting_caller(job->id))
		return;
	foreach(cell, report.settled)
		of_role += ((Settled *) lfirst(cell))->role == job->request.role;
	if (of_role >= MAX_LINES_OF_ROLE)
	{
		report.more_settled++;
		return;
	}
	context = MemoryContextSwitchTo(report.settled_context);
	new = palloc(sizeof(Settled));
	new->role = job->request.role;
	new->sqlstate = error_of(outcome)->sqlstate;
	new->line = describe_job(job, outcome);
	report.settled = lappend(report.settled, new);
	MemoryContextSwitchTo(context);
}

/* The transaction has committed: report the jobs that it has settled. */
void
omni_report_settled(void)
{
	ListCell   *cell;

	if (report.settled == NIL)
		return;
	foreach(cell, report.settled)
	{
		Settled    *settled = lfirst(cell);

		(void) tell(settled->role, settled->sqlstate, settled->line);
	}
	leave_out(report.more_settled);
	omni_report_settling();
}

/* At the end of the minute, report how many lines were left out. */
void
omni_report_left_out(void)
{
	if (omni_clock() < report.minute_ends)
		return;
	if (report.left_out > 0)
		ereport(LOG,
				(errmsg_plural("%d more line about jobs and servers was left out, see table \"%s\"",
							   "%d more lines about jobs and servers were left out, see table \"%s\"",
							   report.left_out, report.left_out, "omni_refresh_job")));
	report.lines = report.ends = report.nshares = report.left_out = 0;
}

static bool
is_bad_end(const OmniOutcome *outcome)
{
	return !outcome->again && (strcmp(outcome->status, OMNI_NAME_FAILED) == 0 ||
							   strcmp(outcome->status, OMNI_NAME_UNKNOWN) == 0);
}

/* Return whether a session has handed a call over again whose job an earlier worker had begun. */
static bool
has_waiting_caller(int64 job)
{
	dlist_iter	iter;

	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (work->call != NULL && !omni_work_is_abandoned(work) && work->call->job_id == job)
			return true;
	}
	return false;
}

/* Describe the end of a job in a line, palloc'd. */
static char *
describe_job(const OmniJob *job, const OmniOutcome *outcome)
{
	const OmniRequest *request = &job->request;
	char	   *model = DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&request->model)));
	StringInfoData line;

	initStringInfo(&line);
	appendStringInfo(&line, "job " INT64_FORMAT " ended as \"%s\" (server ", job->id, outcome->status);
	append_name(&line, NameStr(request->server));
	appendStringInfo(&line, ", model %s, origin %s, requested by ", model, job->origin);
	append_name(&line, NameStr(request->requested_by));
	appendStringInfoChar(&line, ')');
	append_error(&line, error_of(outcome));
	pfree(model);
	return one_line(&line);
}

/* Return the error to tell of a job. */
static const OmniError *
error_of(const OmniOutcome *outcome)
{
	return outcome->job_error != NULL ? outcome->job_error : &outcome->error;
}

/* Append an error without its hint.  Its texts are of bounded length. */
static void
append_error(StringInfo line, const OmniError *error)
{
	if (error->sqlstate != 0)
		appendStringInfo(line, ": %s: %s%s%s", unpack_sql_state(error->sqlstate), error->message,
						 error->detail[0] != '\0' ? "; " : "", error->detail);
}

static void
append_name(StringInfo line, const char *name)
{
	appendStringInfoChar(line, '"');
	for (; *name != '\0'; name++)
	{
		if (*name == '"')
			appendStringInfoChar(line, '"');
		appendStringInfoChar(line, *name);
	}
	appendStringInfoChar(line, '"');
}

/* Replace control characters by spaces.  Returns the text. */
static char *
one_line(StringInfo line)
{
	for (char *c = line->data; *c != '\0'; c++)
	{
		if ((unsigned char) *c < ' ' || *c == 0x7f)
			*c = ' ';
	}
	return line->data;
}

/*
 * See from an attempt whether the server works.  That a call fails does not begin an outage,
 * since its caller hears of it.
 */
static void
note_server(const OmniWork *work)
{
	const OmniOutcome *outcome = &work->outcome;
	bool		answers = !work->transfer->answer.failed && outcome->http_status < 500 &&
	!outcome->few;
	Outage	   *outage;

	forget_outages();
	outage = find_outage(&work->job.request.server);
	if (answers && outage != NULL && outage->lasts)
		end_outage(outage);
	else if (!answers && !work->kind->has_caller)
		begin_outage(outage, work);
}

/* Return the entry of a server, or NULL if it has none. */
static Outage *
find_outage(const NameData *server)
{
	ListCell   *cell;

	foreach(cell, report.outages)
	{
		Outage	   *outage = lfirst(cell);

		if (strcmp(NameStr(outage->server), NameStr(*server)) == 0)
			return outage;
	}
	return NULL;
}

/*
 * Note a failed attempt, the first one of an outage or a further one.  Tell of outages of a
 * server at most once a minute; one that begins within that minute is told at the first
 * attempt after it.  Makes an entry if outage is NULL.
 */
static void
begin_outage(Outage *outage, const OmniWork *work)
{
	const OmniRequest *request = &work->job.request;
	int64		now = omni_clock();

	if (outage == NULL)
	{
		MemoryContext context = MemoryContextSwitchTo(TopMemoryContext);

		outage = palloc0(sizeof(Outage));
		outage->server = request->server;
		report.outages = lappend(report.outages, outage);
		MemoryContextSwitchTo(context);
	}
	if (!outage->lasts)
	{
		outage->lasts = true;
		outage->told = false;
		outage->began = now;
		outage->failures = 0;
	}
	outage->last = now;
	outage->failures++;

	if (!outage->told && (outage->told_at == 0 || now - outage->told_at >= MINUTE))
	{
		StringInfoData line;

		initStringInfo(&line);
		appendStringInfoString(&line, "outage of server ");
		append_name(&line, NameStr(request->server));
		appendStringInfoString(&line, " begins, its jobs are tried again");
		append_error(&line, &work->outcome.error);
		outage->told = tell(request->role, work->outcome.error.sqlstate, one_line(&line));
		if (outage->told)
			outage->told_at = now;
		pfree(line.data);
	}
	else if (!outage->told && outage->failures == 1)
		leave_out(1);
}

/*
 * Tell of the end of an outage if its beginning was told.  No flood of other lines hides it, but
 * many servers may come back within a minute.
 */
static void
end_outage(Outage *outage)
{
	StringInfoData line;

	outage->lasts = false;
	if (!outage->told)
		return;
	begin_minute();
	if (report.ends == MAX_ENDS)
	{
		leave_out(1);
		return;
	}
	report.ends++;
	initStringInfo(&line);
	appendStringInfoString(&line, "outage of server ");
	append_name(&line, NameStr(outage->server));
	appendStringInfo(&line, " has ended after " INT64_FORMAT " s, failed attempts: %d",
					 (omni_clock() - outage->began) / USECS_PER_SEC, outage->failures);
	ereport(LOG, (errmsg_internal("%s", one_line(&line))));
	pfree(line.data);
}

/* Forget outages that are over, and those of servers to which nothing is sent any longer. */
static void
forget_outages(void)
{
	int64		now = omni_clock();
	ListCell   *cell;

	foreach(cell, report.outages)
	{
		Outage	   *outage = lfirst(cell);

		if (now - outage->last >= (outage->lasts ? FORGET_OUTAGE : MINUTE))
		{
			report.outages = foreach_delete_current(report.outages, cell);
			pfree(outage);
		}
	}
}

/* Write a line for a role to the log, or count it.  Returns whether it was written. */
static bool
tell(Oid role, int sqlstate, const char *line)
{
	if (!take_line(role))
	{
		leave_out(1);
		return false;
	}
	ereport(LOG, (errcode(sqlstate), errmsg_internal("%s", line)));
	return true;
}

/* Count lines that are not written. */
static void
leave_out(int lines)
{
	begin_minute();
	report.left_out += lines;
}

/* Begin a new minute if the last one is over. */
static void
begin_minute(void)
{
	omni_report_left_out();
	if (report.lines == 0 && report.ends == 0 && report.left_out == 0)
		report.minute_ends = omni_clock() + MINUTE;
}

/* Take one of the lines of this minute for a role.  Returns false if none is left for it. */
static bool
take_line(Oid role)
{
	Share	   *share = NULL;

	begin_minute();
	for (int i = 0; i < report.nshares; i++)
	{
		if (report.shares[i].role == role)
			share = &report.shares[i];
	}
	if (report.lines >= (share == NULL ? MAX_LINES : MAX_LINES / 2) ||
		(share != NULL && share->lines >= MAX_LINES_OF_ROLE))
		return false;
	if (share == NULL)
	{
		share = &report.shares[report.nshares++];
		share->role = role;
		share->lines = 0;
	}
	share->lines++;
	report.lines++;
	return true;
}
