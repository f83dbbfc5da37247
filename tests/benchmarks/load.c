/* A load for benchmarks: CONNECTIONS callers in a closed loop against one address.
 *
 *   load PORT PATH CONNECTIONS SECONDS STREAM(0|1) MODEL
 *
 * Prints JSON: requests, seconds, errors, chunks (data: lines), and in microseconds the latency of
 * whole answers and the time to the first body byte, at p50 and p99. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BUF (1 << 20)
#define SAMPLES (1 << 21)

struct conn {
    int fd, have_head, chunked, first_seen, match;
    long left;
    double began;
    char head[8192];
    int head_len;
    char tail[16];
    int tail_len;
};
static float latency[SAMPLES], first[SAMPLES];
static long requests, errors, chunks, firsts;
static char request[4096];
static int request_len, stream, poll_fd;
static struct sockaddr_in address;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

static double quantile(float *of, long n, double q) {
    return n ? of[(long)(q * (n - 1))] * 1e6 : 0;
}

static void begin(struct conn *c) {
    c->have_head = c->head_len = c->chunked = c->first_seen = c->match = c->tail_len = 0;
    c->left = 0;
    c->began = now();
    if (send(c->fd, request, request_len, MSG_NOSIGNAL) != request_len) errors++;
}

static void connect_anew(struct conn *c) {
    int one = 1;
    if (c->fd > 0) close(c->fd);
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address)) { perror("connect"); exit(1); }
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, c->fd, &event);
    begin(c);
}

/* Count "data: " over pieces, and see whether the terminator of a chunked body has come. */
static int body(struct conn *c, const char *data, long n) {
    static const char mark[] = "data: ";
    for (long i = 0; i < n; i++) {
        c->match = data[i] == mark[c->match] ? c->match + 1 : data[i] == mark[0];
        if (c->match == 6) { chunks++; c->match = 0; }
    }
    if (!c->chunked) return (c->left -= n) <= 0;
    char joined[32];
    long keep = n < 8 ? n : 8;
    memcpy(joined, c->tail, c->tail_len);
    memcpy(joined + c->tail_len, data + n - keep, keep);
    long total = c->tail_len + keep;
    int ended = total >= 7 && !memcmp(joined + total - 7, "\r\n0\r\n\r\n", 7);
    c->tail_len = total < 8 ? total : 8;
    memmove(c->tail, joined + total - c->tail_len, c->tail_len);
    return ended;
}

int main(int argc, char **argv) {
    if (argc != 7) return 2;
    int connections = atoi(argv[3]);
    double seconds = atof(argv[4]);
    stream = atoi(argv[5]);
    static char buffer[BUF];
    char json[1024];
    int n = snprintf(json, sizeof json,
                     "{\"model\":\"%s\",\"messages\":[{\"role\":\"user\",\"content\":\"Hello, who are you?\"}],"
                     "\"max_tokens\":64%s}", argv[6], stream ? ",\"stream\":true" : "");
    request_len = snprintf(request, sizeof request,
                           "POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                           "Authorization: Bearer none\r\nContent-Length: %d\r\n\r\n%s", argv[2], n, json);
    address.sin_family = AF_INET;
    address.sin_port = htons(atoi(argv[1]));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    poll_fd = epoll_create1(0);
    struct conn *all = calloc(connections, sizeof *all);
    double start = now();
    for (int i = 0; i < connections; i++) connect_anew(&all[i]);
    struct epoll_event events[256];
    while (now() - start < seconds) {
        int ready = epoll_wait(poll_fd, events, 256, 100);
        for (int i = 0; i < ready; i++) {
            struct conn *c = events[i].data.ptr;
            ssize_t got = recv(c->fd, buffer, BUF, MSG_DONTWAIT);
            if (got < 0 && errno == EAGAIN) continue;
            if (got <= 0) { errors++; connect_anew(c); continue; }
            char *data = buffer;
            if (!c->have_head) {
                long room = (long)sizeof c->head - 1 - c->head_len, taken = got < room ? got : room;
                memcpy(c->head + c->head_len, buffer, taken);
                int before = c->head_len;
                c->head_len += taken;
                c->head[c->head_len] = 0;
                char *end = strstr(c->head, "\r\n\r\n");
                if (!end) continue;
                c->have_head = 1;
                if (strncmp(c->head + 9, "200", 3)) errors++;
                long used = end + 4 - c->head - before;
                *end = 0;
                char *length = strcasestr(c->head, "content-length:");
                c->chunked = strcasestr(c->head, "transfer-encoding: chunked") != NULL;
                c->left = length ? atol(length + 15) : 0;
                data += used;
                got -= used;
                if (!got) continue;
            }
            if (!c->first_seen) {
                c->first_seen = 1;
                if (firsts < SAMPLES) first[firsts++] = now() - c->began;
            }
            if (body(c, data, got)) {
                if (requests < SAMPLES) latency[requests] = now() - c->began;
                requests++;
                begin(c);
            }
        }
    }
    double took = now() - start;
    long kept = requests < SAMPLES ? requests : SAMPLES;
    qsort(latency, kept, sizeof *latency, by_value);
    qsort(first, firsts, sizeof *first, by_value);
    printf("{\"requests\":%ld,\"seconds\":%.4f,\"errors\":%ld,\"chunks\":%ld,\"p50_us\":%.1f,\"p99_us\":%.1f,"
           "\"first_p50_us\":%.1f,\"first_p99_us\":%.1f}\n",
           requests, took, errors, chunks, quantile(latency, kept, 0.5), quantile(latency, kept, 0.99),
           quantile(first, firsts, 0.5), quantile(first, firsts, 0.99));
    return 0;
}
