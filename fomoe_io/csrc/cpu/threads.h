/* A fixed team of threads that walk a program together: one barrier after each step. */
#ifndef FOMOE_THREADS_H
#define FOMOE_THREADS_H

typedef struct fomoe_team fomoe_team;

fomoe_team *fomoe_team_new(int threads); /* 1..256, the caller is thread 0; NULL when it can't be made */
void fomoe_team_free(fomoe_team *);
int fomoe_team_size(const fomoe_team *);
/* Run work(argument, thread) on every thread; returns when all are done. */
void fomoe_team_run(fomoe_team *, void (*work)(void *argument, int thread), void *argument);
/* Wait until all threads of the team are here.  Spins briefly, then sleeps (futex), so that a machine with
 * fewer free cores than threads is slow, not stuck. */
void fomoe_team_barrier(fomoe_team *);

#endif
