// Read bandwidth of this machine: every thread sums its own part of a buffer with 8 independent vector accumulators.
// usage: bandwidth THREADS [GIB] [REPEATS]; prints the best GB/s (1e9 bytes) of REPEATS passes.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef uint64_t v8 __attribute__((vector_size(64)));
static int threads, repeats;
static size_t part;  // bytes per thread
static char *buffer;
static pthread_barrier_t barrier;
static volatile uint64_t sink;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void *work(void *arg) {
  const v8 *p = (const v8 *)(buffer + (size_t)(intptr_t)arg * part);
  memset((void *)p, 1, part);
  for (int r = 0; r < repeats; r++) {
    v8 a[8] = {0};
    pthread_barrier_wait(&barrier);
    for (size_t i = 0; i < part / sizeof(v8); i += 8)
      for (int k = 0; k < 8; k++) a[k] ^= p[i + k];
    v8 s = a[0];
    for (int k = 1; k < 8; k++) s ^= a[k];
    sink += s[0] + s[3];
    pthread_barrier_wait(&barrier);
  }
  return 0;
}

int main(int argc, char **argv) {
  threads = argc > 1 ? atoi(argv[1]) : 2;
  double gib = argc > 2 ? atof(argv[2]) : 1;
  repeats = argc > 3 ? atoi(argv[3]) : 8;
  part = ((size_t)(gib * (1u << 30)) / threads) & ~(size_t)4095;
  buffer = mmap(0, part * threads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (buffer == MAP_FAILED) return perror("mmap"), 1;
  madvise(buffer, part * threads, MADV_HUGEPAGE);
  pthread_barrier_init(&barrier, 0, threads + 1);
  pthread_t id;
  for (intptr_t i = 0; i < threads; i++) pthread_create(&id, 0, work, (void *)i);
  double best = 0;
  for (int r = 0; r < repeats; r++) {
    pthread_barrier_wait(&barrier);
    double t = now();
    pthread_barrier_wait(&barrier);
    double g = (double)part * threads / (now() - t) / 1e9;
    if (g > best) best = g;
  }
  printf("%.2f\n", best);
  return 0;
}
