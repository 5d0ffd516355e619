/*-------------------------------------------------------------------------
 *
 * lane.h
 *		Which requests cover others, and which one request can satisfy.  See lane.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_LANE_H
#define OMNI_LANE_H

#include "utils/uuid.h"

/* A name of a schema or table */
typedef struct LaneName
{
	const char *text;
	int			cost;			/* bytes of a URL that it takes, with a comma */
} LaneName;

/* Names in order, each of them once; a count of 0 means that there is no list */
typedef struct LaneNames
{
	LaneName   *names;
	int			count;
} LaneNames;

/* What a request asks for, apart from its target */
typedef struct LaneRequest
{
	bool		hard;			/* then there are no lists */
	LaneNames	schemas;
	LaneNames	tables;
	bool		has_time;		/* of a reset: else it is one of the moment
								 * when it is sent */
	int64		time;
} LaneRequest;

/* A job of a lane */
typedef struct LaneJob
{
	int64		id;
	int			kind;
	pg_uuid_t	model;
	pg_uuid_t	branch;			/* zeros if there is none */
	bool		has_branch;
	const char *policy;			/* of a reset; else empty */
	LaneRequest request;
	int			carrier;		/* set by lane_merge(): index of the job that
								 * carries this one out, its own if none does */
} LaneJob;

extern bool lane_covers(const LaneRequest *job, const LaneRequest *other);
extern bool lane_unite(const LaneRequest *a, const LaneRequest *b, int room, LaneRequest *both);
extern bool lane_is_alike(const LaneJob *a, const LaneJob *b);
extern void lane_merge(LaneJob *jobs, int count, int room);
extern void lane_sort(LaneNames *list);

#endif							/* OMNI_LANE_H */
