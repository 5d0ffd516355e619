/*-------------------------------------------------------------------------
 *
 * xact.h
 *		The worker's transactions.  See xact.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_XACT_H
#define OMNI_XACT_H

#include "base/error.h"

/* How long a call waits, in ms, while another session holds a lock on the tables */
#define OMNI_LOCK_PATIENCE	5000

/* How long to wait, in ms, before a transaction is tried again; doubled up to the maximum */
#define OMNI_LOCAL_DELAY	100
#define OMNI_LOCAL_DELAY_MAX	30000

/* The result of a transaction */
typedef enum OmniTransacted
{
	COMMITTED,
	NOT_NOW,					/* another session is in the way */
	FAILED
} OmniTransacted;

extern void omni_block_cancel(void);
extern OmniTransacted omni_transact(bool (*body) (void *), void *arg, bool flush,
									OmniError *error);
extern long omni_notify_listeners(void);

#endif							/* OMNI_XACT_H */
