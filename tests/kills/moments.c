// SPDX-License-Identifier: Apache-2.0
// Stands before the C library (LD_PRELOAD), counts what a process does to the files below a folder, and kills it at a
// given moment: before a file is made, renamed, removed or synced, or in the midst of a write. So a kill can be aimed at
// every saving moment, also at those inside of libraries. moments_arm() starts it; until then nothing is counted.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static size_t length;
static long kill_at;
static atomic_long count;
static int list = -1;

void moments_arm(const char* below, long at, int list_handle) {
    snprintf(folder, sizeof folder, "%s", below);
    kill_at = at;
    list = list_handle;
    atomic_store(&count, 0);
    length = strlen(folder);
}

#define NEXT(name) __typeof__(&name) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

// The absolute name of `name` as the system would find it from `handle`.
static void absolute(int handle, const char* name, char* out) {
    char base[PATH_MAX] = "", link[64];
    if (name[0] != '/') {
        if (handle == AT_FDCWD) {
            snprintf(link, sizeof link, "/proc/self/cwd");
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
        }
        ssize_t n = readlink(link, base, sizeof base - 1);
        base[n > 0 ? n : 0] = 0;
    }
    if (!name[0]) {
        snprintf(out, PATH_MAX, "%.*s", PATH_MAX - 1, base);
    } else if (name[0] == '/') {
        snprintf(out, PATH_MAX, "%.*s", PATH_MAX - 1, name);
    } else {
        snprintf(out, PATH_MAX, "%.2000s/%.2000s", base, name);
    }
}

// Is this moment the one? It is counted where the name lies below the folder.
static int now(const char* what, int handle, const char* name) {
    char path[PATH_MAX], line[PATH_MAX + 64];
    if (!length) {
        return 0;
    }
    absolute(handle, name, path);
    if (strncmp(path, folder, length) || path[length] != '/') {
        return 0;
    }
    long number = atomic_fetch_add(&count, 1) + 1;
    if (list >= 0) {
        int n = snprintf(line, sizeof line, "%s %.4000s\n", what, path + length + 1);
        NEXT(write);
        if (next(list, line, n) != n) {
            _exit(97);
        }
    }
    return number == kill_at;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) {
        pause();
    }
}

#define BEFORE(what, handle, name) \
    if (now(what, handle, name)) { \
        die(); \
    }

ssize_t write(int handle, const void* data, size_t size) {
    NEXT(write);
    if (now("write", handle, "")) {
        next(handle, data, size / 2);
        die();
    }
    return next(handle, data, size);
}

ssize_t writev(int handle, const struct iovec* parts, int number) {
    NEXT(writev);
    if (now("write", handle, "")) {
        next(handle, parts, number / 2);
        die();
    }
    return next(handle, parts, number);
}

ssize_t pwrite64(int handle, const void* data, size_t size, off64_t at) {
    NEXT(pwrite64);
    if (now("write", handle, "")) {
        next(handle, data, size / 2, at);
        die();
    }
    return next(handle, data, size, at);
}

ssize_t pwrite(int handle, const void* data, size_t size, off_t at) {
    NEXT(pwrite);
    if (now("write", handle, "")) {
        next(handle, data, size / 2, at);
        die();
    }
    return next(handle, data, size, at);
}

#define OPEN(function, handle, name, ...) \
    mode_t mode = 0; \
    if (flags & O_CREAT) { \
        va_list more; \
        va_start(more, flags); \
        mode = va_arg(more, int); \
        va_end(more); \
        BEFORE("create", handle, name) \
    } \
    NEXT(function); \
    return next(__VA_ARGS__, flags, mode);

int open(const char* name, int flags, ...) { OPEN(open, AT_FDCWD, name, name) }
int open64(const char* name, int flags, ...) { OPEN(open64, AT_FDCWD, name, name) }
int openat(int handle, const char* name, int flags, ...) { OPEN(openat, handle, name, handle, name) }
int openat64(int handle, const char* name, int flags, ...) { OPEN(openat64, handle, name, handle, name) }

int rename(const char* from, const char* to) {
    BEFORE("rename", AT_FDCWD, to)
    NEXT(rename);
    return next(from, to);
}

int renameat(int a, const char* from, int b, const char* to) {
    BEFORE("rename", b, to)
    NEXT(renameat);
    return next(a, from, b, to);
}

int renameat2(int a, const char* from, int b, const char* to, unsigned flags) {
    BEFORE("rename", b, to)
    NEXT(renameat2);
    return next(a, from, b, to, flags);
}

int unlink(const char* name) {
    BEFORE("remove", AT_FDCWD, name)
    NEXT(unlink);
    return next(name);
}

int unlinkat(int handle, const char* name, int flags) {
    BEFORE("remove", handle, name)
    NEXT(unlinkat);
    return next(handle, name, flags);
}

int rmdir(const char* name) {
    BEFORE("remove", AT_FDCWD, name)
    NEXT(rmdir);
    return next(name);
}

int mkdir(const char* name, mode_t mode) {
    BEFORE("create", AT_FDCWD, name)
    NEXT(mkdir);
    return next(name, mode);
}

int mkdirat(int handle, const char* name, mode_t mode) {
    BEFORE("create", handle, name)
    NEXT(mkdirat);
    return next(handle, name, mode);
}

int fsync(int handle) {
    BEFORE("sync", handle, "")
    NEXT(fsync);
    return next(handle);
}

int fdatasync(int handle) {
    BEFORE("sync", handle, "")
    NEXT(fdatasync);
    return next(handle);
}

int ftruncate64(int handle, off64_t size) {
    BEFORE("cut", handle, "")
    NEXT(ftruncate64);
    return next(handle, size);
}
