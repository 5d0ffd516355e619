/*-------------------------------------------------------------------------
 *
 * compat.h
 *		All differences between PostgreSQL 15 to 19, and between versions of libcurl,
 *		so that no other file tests a version.
 *
 * All code uses the newest release's names.  This file defines those that older releases
 * lack, in the order of the releases that added them, so that dropping a release means
 * deleting its block.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_COMPAT_H
#define OMNI_COMPAT_H

/* from 7.87 on, libcurl marks curl_multi_socket_all() as deprecated */
#define CURL_DISABLE_DEPRECATION
#include <curl/curl.h>

#include "executor/executor.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "parser/parse_relation.h"
#include "storage/dsm.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"
#include "utils/relcache.h"
#include "utils/guc.h"
#include "utils/resowner.h"
#include "utils/wait_event.h"

#include "omni_refresh.h"

#if PG_VERSION_NUM < 150000
#error "omni_refresh needs PostgreSQL 15 or newer"
#endif

#if LIBCURL_VERSION_NUM < 0x074c01
#error "omni_refresh needs libcurl 7.76.1 or newer"
#endif

/* 16 renamed the function that begins a result of many rows */
#if PG_VERSION_NUM >= 160000
#define omni_materialize_compat(fcinfo) InitMaterializedSRF(fcinfo, 0)
#else
#define omni_materialize_compat(fcinfo) SetSingleFuncCall(fcinfo, 0)
#endif

/* 16 replaced the functions that check privileges on one kind of object */
#if PG_VERSION_NUM < 160000
#define object_aclcheck(classid, objectid, roleid, mode) \
	((classid) == ForeignServerRelationId ? pg_foreign_server_aclcheck(objectid, roleid, mode) : \
	 pg_foreign_data_wrapper_aclcheck(objectid, roleid, mode))
#endif

/* 16 renamed what identifies a relation's file */
#if PG_VERSION_NUM < 160000
#define rd_firstRelfilelocatorSubid rd_firstRelfilenodeSubid
#endif

/* 16 added the fifth argument, the result relations */
#if PG_VERSION_NUM < 160000
#define EvalPlanQualInit(epqstate, parent, subplan, auxrowmarks, param, results) \
	EvalPlanQualInit(epqstate, parent, subplan, auxrowmarks, param)
#endif

/*
 * Make a table the only entry of a range table; updated has the numbers of the columns to
 * update, as a Bitmapset is used for them.  16 moved them to an entry of their own, 18
 * wants to know which tables were not pruned.
 */
static inline void
init_range_table_compat(EState *estate, RangeTblEntry *rte, Bitmapset *updated)
{
#if PG_VERSION_NUM < 160000
	rte->updatedCols = updated;
	ExecInitRangeTable(estate, list_make1(rte));
#else
	List	   *permissions = NIL;

	addRTEPermissionInfo(&permissions, rte)->updatedCols = updated;
#if PG_VERSION_NUM < 180000
	ExecInitRangeTable(estate, list_make1(rte), permissions);
#else
	ExecInitRangeTable(estate, list_make1(rte), permissions, bms_make_singleton(1));
#endif
#endif
}

/* 17 added named wait events for extensions */
#if PG_VERSION_NUM < 170000
#define WaitEventExtensionNew(name) ((uint32) PG_WAIT_EXTENSION)
#endif

/* 17 added the resource owner of a WaitEventSet; NULL means until the process exits */
#if PG_VERSION_NUM < 170000
#define CreateWaitEventSet(resowner, nevents) \
	CreateWaitEventSet(((void) (resowner), TopMemoryContext), nevents)
#endif

/* 18 added the library's version to the magic block, and renamed a keyword */
#if PG_VERSION_NUM < 180000
#define PG_MODULE_MAGIC_EXT(...) PG_MODULE_MAGIC
#define pg_noreturn pg_attribute_noreturn()
#endif

/* 18 added the second argument: whether a deferrable key will do */
#if PG_VERSION_NUM < 180000
#define RelationGetPrimaryKeyIndex(relation, deferrable_ok) RelationGetPrimaryKeyIndex(relation)
#endif

/* 18 renamed the expressions of CHECK constraints; one that is NULL holds */
#if PG_VERSION_NUM < 180000
#define ri_CheckConstraintExprs ri_ConstraintExprs
#endif

/* 19 can terminate background workers that block DROP DATABASE and similar commands */
#if PG_VERSION_NUM < 190000
#define BGWORKER_INTERRUPTIBLE 0
#endif

/* 19 names a tranche when it allocates the id */
#if PG_VERSION_NUM < 190000
#define LWLockNewTrancheId(name) ((void) (name), LWLockNewTrancheId())
#endif

/*
 * Return the address of a named piece of shared memory; the first process that asks
 * allocates and initializes it.  It must begin with an LWLock, whose tranche gets the name
 * of the extension.  May raise an error.
 *
 * 17 added a registry for this.  In older releases, take the memory from the spare part of
 * the main segment, as pg_prewarm did.  Before 19, each process must name the tranche.
 */
#if PG_VERSION_NUM >= 170000
#include "storage/dsm_registry.h"
#endif

#if PG_VERSION_NUM >= 190000
#define OMNI_SHARED_INIT_ARGS void *memory, void *arg
#else
#define OMNI_SHARED_INIT_ARGS void *memory
#endif

static inline void *
shared_memory_compat(const char *name, Size size,
					 void (*init) (OMNI_SHARED_INIT_ARGS))
{
	void	   *shared;
	bool		found;

#if PG_VERSION_NUM < 170000
	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	shared = ShmemInitStruct(name, size, &found);
	if (!found)
		init(shared);
	LWLockRelease(AddinShmemInitLock);
#elif PG_VERSION_NUM < 190000
	shared = GetNamedDSMSegment(name, size, init, &found);
#else
	shared = GetNamedDSMSegment(name, size, init, &found, NULL);
#endif
#if PG_VERSION_NUM < 190000
	LWLockRegisterTranche(((LWLock *) shared)->tranche, OMNI_EXTENSION);
#endif
	return shared;
}

/* libcurl 7.85 replaced the bit mask of protocols by a string */
static inline CURLcode
curl_allow_protocols_compat(CURL *easy)
{
#if LIBCURL_VERSION_NUM < 0x075500
	return curl_easy_setopt(easy, CURLOPT_PROTOCOLS,
							(long) (CURLPROTO_HTTP | CURLPROTO_HTTPS));
#else
	return curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
#endif
}

/*
 * libcurl 7.80 added a callback before each request.  With older versions, call the
 * function once, now.  They therefore still send a request that is withdrawn later, and may
 * send one twice: on a connection that the server has closed, then on a new one.
 */
static inline CURLcode
curl_before_request_compat(CURL *easy, int (*function) (void *, char *, char *, int, int),
						   void *arg)
{
#if LIBCURL_VERSION_NUM < 0x075000
	function(arg, NULL, NULL, 0, 0);
	return CURLE_OK;
#else
	CURLcode	code = curl_easy_setopt(easy, CURLOPT_PREREQFUNCTION, function);

	return code == CURLE_OK ? curl_easy_setopt(easy, CURLOPT_PREREQDATA, arg) : code;
#endif
}

/* libcurl 8.6 has a code of its own for headers that are too long */
#if LIBCURL_VERSION_NUM < 0x080600
#define CURLE_TOO_LARGE CURLE_OUT_OF_MEMORY
#endif

/*
 * libcurl 7.87 can exit without joining the resolver's thread.  With older versions, the
 * worker cannot exit before a hanging name look-up ends.
 */
static inline CURLcode
curl_quick_exit_compat(CURL *easy)
{
#if LIBCURL_VERSION_NUM < 0x075700
	return CURLE_OK;
#else
	return curl_easy_setopt(easy, CURLOPT_QUICK_EXIT, 1L);
#endif
}

#endif							/* OMNI_COMPAT_H */
