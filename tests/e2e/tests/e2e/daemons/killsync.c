/* Preloaded into a daemon: kills it with SIGKILL right before or after the sync of its journal that a plan names. The plan
 * is a file, "2 before" for example; each sync of the journal counts it down, the last one removes it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char JOURNAL[] = "/journal.redb";

static int is_journal(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < (ssize_t)strlen(JOURNAL)) return 0;
    path[length] = 0;
    return strcmp(path + length - strlen(JOURNAL), JOURNAL) == 0;
}

enum { LIVE, BEFORE, AFTER };

static int due(int fd) {
    const char *plan = getenv("TEST_KILL_PLAN");
    if (!plan || !is_journal(fd)) return LIVE;
    FILE *file = fopen(plan, "r");
    if (!file) return LIVE;
    int left = 0;
    char when[16] = "";
    int read = fscanf(file, "%d %15s", &left, when);
    fclose(file);
    if (read != 2) return LIVE;
    if (left > 1) {
        file = fopen(plan, "w");
        if (file) {
            fprintf(file, "%d %s\n", left - 1, when);
            fclose(file);
        }
        return LIVE;
    }
    unlink(plan);
    return strcmp(when, "before") == 0 ? BEFORE : AFTER;
}

static int synced(const char *name, int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    int end = due(fd);
    if (end == BEFORE) kill(getpid(), SIGKILL);
    int result = real(fd);
    if (end == AFTER) kill(getpid(), SIGKILL);
    return result;
}

int fdatasync(int fd) { return synced("fdatasync", fd); }
int fsync(int fd) { return synced("fsync", fd); }
