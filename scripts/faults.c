/* Loaded before libc (LD_PRELOAD) by faults.py: a storage and a clock that misbehave.

   FAULTS_FOLDER  calls on files below it fail now and then
   FAULTS_ONE_IN  one in so many, with EIO, ESTALE or ETIMEDOUT; which ones follows from FAULTS_SEED
   FAULTS_CLOCK   the clock on the wall jumps by so many seconds, FAULTS_AFTER ms after the start

   Python, and the C++ below orbax, go through libc alike. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static uint64_t mix(uint64_t x) { /* splitmix64 */
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

static long number(const char *name) {
  const char *text = getenv(name);
  return text ? atol(text) : 0;
}

static int fails(const char *path) {
  static const int codes[] = {EIO, ESTALE, ETIMEDOUT};
  static uint64_t calls;
  const char *folder = getenv("FAULTS_FOLDER");
  if (!folder || !path || strncmp(path, folder, strlen(folder))) return 0;
  uint64_t drawn = mix(mix(number("FAULTS_SEED")) + __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED));
  if (drawn % number("FAULTS_ONE_IN")) return 0;
  errno = codes[mix(drawn) % 3];
  return 1;
}

static int fails_at(int file) {
  if (!getenv("FAULTS_FOLDER")) return 0;
  char link[32], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_PATH(type, name, parameters, arguments, path) \
  type name parameters { return fails(path) ? -1 : REAL(name) arguments; }
#define ON_FILE(type, name, parameters, arguments) \
  type name parameters { return fails_at(file) ? -1 : REAL(name) arguments; }
#define OPEN(name)                                                  \
  int name(const char *path, int flags, ...) {                      \
    va_list rest;                                                   \
    va_start(rest, flags);                                          \
    mode_t mode = va_arg(rest, mode_t);                             \
    va_end(rest);                                                   \
    return fails(path) ? -1 : REAL(name)(path, flags, mode);        \
  }
#define OPENAT(name)                                                \
  int name(int folder, const char *path, int flags, ...) {          \
    va_list rest;                                                   \
    va_start(rest, flags);                                          \
    mode_t mode = va_arg(rest, mode_t);                             \
    va_end(rest);                                                   \
    return fails(path) ? -1 : REAL(name)(folder, path, flags, mode); \
  }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
ON_PATH(int, mkdir, (const char *path, mode_t mode), (path, mode), path)
ON_PATH(int, unlink, (const char *path), (path), path)
ON_PATH(int, rename, (const char *path, const char *to), (path, to), path)
ON_PATH(int, renameat, (int a, const char *path, int b, const char *to), (a, path, b, to), path)
ON_FILE(ssize_t, write, (int file, const void *bytes, size_t n), (file, bytes, n))
ON_FILE(ssize_t, pwrite, (int file, const void *bytes, size_t n, off_t at), (file, bytes, n, at))
ON_FILE(ssize_t, pwrite64, (int file, const void *bytes, size_t n, off64_t at), (file, bytes, n, at))
ON_FILE(ssize_t, read, (int file, void *bytes, size_t n), (file, bytes, n))
ON_FILE(ssize_t, pread, (int file, void *bytes, size_t n, off_t at), (file, bytes, n, at))
ON_FILE(ssize_t, pread64, (int file, void *bytes, size_t n, off64_t at), (file, bytes, n, at))
ON_FILE(int, fsync, (int file), (file))
ON_FILE(int, fdatasync, (int file), (file))

static long milliseconds(void) {
  struct timespec now;
  REAL(clock_gettime)(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static long start;
__attribute__((constructor)) static void begin(void) { start = milliseconds(); }

static long jump(void) {
  return milliseconds() - start >= number("FAULTS_AFTER") ? number("FAULTS_CLOCK") : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int result = REAL(clock_gettime)(clock, now);
  if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += jump();
  return result;
}

int gettimeofday(struct timeval *now, void *zone) {
  int result = REAL(gettimeofday)(now, zone);
  if (!result) now->tv_sec += jump();
  return result;
}

time_t time(time_t *now) {
  struct timespec seen;
  clock_gettime(CLOCK_REALTIME, &seen);
  if (now) *now = seen.tv_sec;
  return seen.tv_sec;
}
