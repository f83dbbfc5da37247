/* An engine for benchmarks: HTTP/1.1 with keep-alive on one epoll loop, as fast as one core goes.
 *
 *   stub_engine PORT CHUNKS_PER_SECOND
 *
 * POST with "stream":true in the body: 201 chunks at that pace (0: at once), the last with a finish
 * reason, then usage and [DONE]. Any other POST: a small chat completion. GET: a list of one model. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_FD 4096
#define CHUNKS 200
#define BUF 65536

struct conn {
    char in[BUF];
    int len, streaming, sent;
    double next;
};
static struct conn *conns[MAX_FD];
static double pace;

static const char BODY[] =
    "{\"id\":\"c\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"stub\",\"choices\":[{\"index\":0,"
    "\"message\":{\"role\":\"assistant\",\"content\":\"Hello there, how can I help you today?\"},"
    "\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":9,\"total_tokens\":18}}";
static const char MODELS[] =
    "{\"object\":\"list\",\"data\":[{\"id\":\"stub\",\"object\":\"model\",\"created\":1,\"owned_by\":\"stub\"}]}";
static const char CHUNK[] =
    "data: {\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"stub\",\"choices\":"
    "[{\"index\":0,\"delta\":{\"content\":\" token\"},\"finish_reason\":null}]}\n\n";
static const char END[] =
    "data: {\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"stub\",\"choices\":"
    "[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n"
    "data: {\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"stub\",\"choices\":[],"
    "\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":200,\"total_tokens\":209}}\n\n"
    "data: [DONE]\n\n";

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int put(int fd, const char *data, size_t size) {
    while (size) {
        ssize_t n = send(fd, data, size, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN) { usleep(50); continue; }
            return -1;
        }
        data += n;
        size -= n;
    }
    return 0;
}

static int put_chunk(int fd, const char *data, size_t size) {
    char out[2048];
    int n = snprintf(out, sizeof out, "%zx\r\n", size);
    memcpy(out + n, data, size);
    memcpy(out + n + size, "\r\n", 2);
    return put(fd, out, n + size + 2);
}

static void drop(int fd) {
    free(conns[fd]);
    conns[fd] = NULL;
    close(fd);
}

static int answer(int fd, struct conn *c) {
    char *end;
    while (c->len && (end = memmem(c->in, c->len, "\r\n\r\n", 4))) {
        *end = 0;
        int head = end - c->in + 4, size = 0;
        char *length = strcasestr(c->in, "content-length:");
        if (length) size = atoi(length + 15);
        int get = !strncmp(c->in, "GET", 3);
        *end = '\r';
        if (c->len < head + size) return 0;
        char *stream = size ? memmem(c->in + head, size, "\"stream\":", 9) : NULL;
        int streaming = stream && (stream[9] == 't' || stream[10] == 't');
        memmove(c->in, c->in + head + size, c->len - head - size);
        c->len -= head + size;
        if (streaming) {
            static const char h[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
                                    "Transfer-Encoding: chunked\r\n\r\n";
            if (put(fd, h, sizeof h - 1)) return -1;
            c->streaming = 1;
            c->sent = 0;
            c->next = now();
            continue;
        }
        const char *body = get ? MODELS : BODY;
        char out[2048];
        int n = snprintf(out, sizeof out,
                         "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                         strlen(body), body);
        if (put(fd, out, n)) return -1;
    }
    return 0;
}

static void advance(int fd, struct conn *c, double t) {
    while (c->streaming && t >= c->next) {
        int failed = c->sent < CHUNKS ? put_chunk(fd, CHUNK, sizeof CHUNK - 1)
                                      : put_chunk(fd, END, sizeof END - 1) || put(fd, "0\r\n\r\n", 5);
        if (failed) { drop(fd); return; }
        if (c->sent++ == CHUNKS) c->streaming = 0;
        c->next += pace;
    }
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    double rate = atof(argv[2]);
    pace = rate > 0 ? 1 / rate : 0;
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), top = 0;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1024)) return 1;
    int poll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[256];
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int wait = -1;
        double t = now();
        for (int fd = 0; fd <= top; fd++)
            if (conns[fd] && conns[fd]->streaming) {
                advance(fd, conns[fd], t);
                if (conns[fd] && conns[fd]->streaming) wait = 1;
            }
        int n = epoll_wait(poll, events, 256, wait);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    if (fd >= MAX_FD) { close(fd); continue; }
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    conns[fd] = calloc(1, sizeof(struct conn));
                    if (fd > top) top = fd;
                    event.data.fd = fd;
                    epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
                }
                continue;
            }
            struct conn *c = conns[fd];
            if (!c) continue;
            ssize_t got = recv(fd, c->in + c->len, BUF - c->len, 0);
            if (got <= 0) {
                if (got < 0 && errno == EAGAIN) continue;
                drop(fd);
                continue;
            }
            c->len += got;
            if (answer(fd, c)) drop(fd);
        }
    }
}
