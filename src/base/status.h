/*-------------------------------------------------------------------------
 *
 * status.h
 *		Every status of a job and every kind of event, once.
 *
 * test/sql/status.sql reads the lists in this file and compares them with the
 * constraints and the partial indexes of the two tables.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_STATUS_H
#define OMNI_STATUS_H

/* The names, as the tables have them */
#define OMNI_NAME_PENDING			"pending"
#define OMNI_NAME_SENDING			"sending"
#define OMNI_NAME_RUNNING			"running"
#define OMNI_NAME_COMPLETED			"completed"
#define OMNI_NAME_FAILED			"failed"
#define OMNI_NAME_ACCEPTED			"accepted"
#define OMNI_NAME_CANCELED			"canceled"
#define OMNI_NAME_MERGED			"merged"
#define OMNI_NAME_UNKNOWN			"unknown"
#define OMNI_NAME_ATTEMPT_FAILED	"attempt_failed"
#define OMNI_NAME_REFUSED			"refused"
#define OMNI_NAME_RATE_LIMITED		"rate_limited"
#define OMNI_NAME_RELEASED			"released"
#define OMNI_NAME_RECOVERED			"recovered"
#define OMNI_NAME_WAITING			"waiting"
#define OMNI_NAME_CHANGED			"changed"

/* The statuses of a job; SEP stands between two of them. */
#define OMNI_STATUSES_UNFINISHED(X, SEP) \
	X(PENDING) SEP X(SENDING) SEP X(RUNNING)
#define OMNI_STATUSES_FINAL(X, SEP) \
	X(COMPLETED) SEP X(FAILED) SEP X(ACCEPTED) SEP X(CANCELED) SEP X(MERGED) SEP X(UNKNOWN)

/* The kinds of events; the event that ends a job has the name of its status. */
#define OMNI_EVENTS(X, SEP) \
	X(SENDING) SEP X(ACCEPTED) SEP X(ATTEMPT_FAILED) SEP X(REFUSED) SEP \
	X(RATE_LIMITED) SEP X(MERGED) SEP X(RELEASED) SEP X(CANCELED) SEP X(RECOVERED) SEP \
	X(WAITING) SEP X(CHANGED) SEP \
	X(COMPLETED) SEP X(FAILED) SEP X(UNKNOWN)

/* OMNI_STATUS_PENDING and so on; those from OMNI_STATUS_COMPLETED on are final. */
#define OMNI_STATUS_CONSTANT(name) OMNI_STATUS_ ## name,
typedef enum OmniStatus
{
	OMNI_STATUSES_UNFINISHED(OMNI_STATUS_CONSTANT,)
	OMNI_STATUSES_FINAL(OMNI_STATUS_CONSTANT,)
} OmniStatus;

/* For the text of statements: a name in quotes, and lists of names to compare with */
#define OMNI_NAME(name)				OMNI_NAME_ ## name
#define OMNI_SQL(name)				"'" OMNI_NAME_ ## name "'"
#define OMNI_SQL_UNFINISHED			"'{" OMNI_STATUSES_UNFINISHED(OMNI_NAME, ", ") "}'"
#define OMNI_SQL_FINAL				"'{" OMNI_STATUSES_FINAL(OMNI_NAME, ", ") "}'"

extern const char *omni_status_name(OmniStatus status);
extern bool omni_status_find(const char *name, OmniStatus *status);
extern bool omni_status_is_final(OmniStatus status);
extern bool omni_status_is_pending(OmniStatus status);

#endif							/* OMNI_STATUS_H */
