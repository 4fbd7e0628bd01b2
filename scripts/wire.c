#define _GNU_SOURCE
// A wire between two network namespaces that holds every frame back (netem is not in every kernel):
//     wire MICROSECONDS TAP_A TAP_B
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define HELD 4096 // frames under way, a power of two

static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static struct {
    long due;
    int to, size;
    char frame[2048];
} held[HELD];

int main(int argc, char **argv) {
    if (argc != 4) return fputs("usage: wire MICROSECONDS TAP_A TAP_B\n", stderr), 2;
    long delay = atol(argv[1]) * 1000;
    struct pollfd ends[2];
    for (int i = 0; i < 2; i++) {
        struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};
        strncpy(request.ifr_name, argv[2 + i], IFNAMSIZ - 1);
        ends[i].fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
        ends[i].events = POLLIN;
        if (ioctl(ends[i].fd, TUNSETIFF, &request) < 0) return perror(argv[2 + i]), 1;
    }
    prctl(PR_SET_TIMERSLACK, 1);
    puts("ready");
    fflush(stdout);
    for (unsigned first = 0, last = 0;;) {
        long left = held[first % HELD].due - now();
        struct timespec sleep = {0, left > 0 ? left : 0};
        ppoll(ends, 2, first == last ? NULL : &sleep, NULL);
        for (int i = 0; i < 2; i++)
            while (last - first < HELD) {
                int size = read(ends[i].fd, held[last % HELD].frame, sizeof held->frame);
                if (size <= 0) break;
                held[last % HELD].due = now() + delay;
                held[last % HELD].to = ends[1 - i].fd;
                held[last++ % HELD].size = size;
            }
        for (; first != last && held[first % HELD].due <= now(); first++)
            if (write(held[first % HELD].to, held[first % HELD].frame, held[first % HELD].size) < 0)
                continue; // as a wire loses what its end does not take
    }
}
