/*
 * A stand-in for libnvidia-ml.so.1, for tests of the code above pynvml.
 *
 * It shows the machine that the text file named by NVML_STUB_FILE describes; the file is read anew at
 * every call, so that a test changes figures by replacing it. Lines are "key value..."; "gpu" begins a
 * device, to which the lines after it belong:
 *
 *     driver 580.95.05
 *     init_error 9
 *     hang                         calls for devices do not return while this line is there
 *     gpu GPU-uuid Product name
 *     memory TOTAL FREE RESERVED   without it: NOT_SUPPORTED
 *     memory_error CODE
 *     utilization GPU MEMORY
 *     temperature CELSIUS
 *     power MILLIWATTS LIMIT
 *     reasons HEXMASK
 *     process PID BYTES            a compute process; BYTES "-" is the all-ones "no value"
 *     graphics PID BYTES           a process that draws; without one: NOT_SUPPORTED
 *     mig
 *     xid NUMBER                   delivered once for each initialisation
 *     error CODE                   every call for the device fails so
 *
 * -DOLD_DRIVER leaves out what drivers of some years ago did not export. A figure that is not
 * described is NOT_SUPPORTED. NVML's `used` is deliberately nonsense: nobody may rely on it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_GPUS 8
#define MAX_PROCESSES 16

enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, TIMED_OUT = 10, VERSION_MISMATCH = 25
};

typedef unsigned long long u64;

struct process { unsigned pid; u64 bytes; };

struct processes { int count; struct process process[MAX_PROCESSES]; };

struct gpu {
    char uuid[80], name[96];
    int has_memory, memory_error, has_utilization, has_temperature, has_power, has_reasons, mig, xid, error;
    u64 total, free, reserved, reasons;
    unsigned utilization, memory_utilization, temperature, power, power_limit;
    struct processes computing, drawing;
};

struct machine {
    char driver[80];
    int init_error, hang, gpus;
    struct gpu gpu[MAX_GPUS];
};

/* A handle is the address of one of these bytes. */
static char handles[MAX_GPUS];
static int initialised;
static int event_delivered[MAX_GPUS];

static void read_process(struct processes *processes, const char *line)
{
    char bytes[32];
    struct process *process = &processes->process[processes->count];
    if (processes->count < MAX_PROCESSES && sscanf(line, "%*s %u %31s", &process->pid, bytes) == 2) {
        process->bytes = bytes[0] == '-' ? ~0ULL : strtoull(bytes, NULL, 10);
        processes->count++;
    }
}

static void read_gpu_line(struct gpu *gpu, const char *line)
{
    if (sscanf(line, "memory %llu %llu %llu", &gpu->total, &gpu->free, &gpu->reserved) == 3) gpu->has_memory = 1;
    else if (sscanf(line, "memory_error %d", &gpu->memory_error) == 1) return;
    else if (sscanf(line, "utilization %u %u", &gpu->utilization, &gpu->memory_utilization) == 2)
        gpu->has_utilization = 1;
    else if (sscanf(line, "temperature %u", &gpu->temperature) == 1) gpu->has_temperature = 1;
    else if (sscanf(line, "power %u %u", &gpu->power, &gpu->power_limit) == 2) gpu->has_power = 1;
    else if (sscanf(line, "reasons %llx", &gpu->reasons) == 1) gpu->has_reasons = 1;
    else if (sscanf(line, "xid %d", &gpu->xid) == 1) return;
    else if (sscanf(line, "error %d", &gpu->error) == 1) return;
    else if (strncmp(line, "mig", 3) == 0) gpu->mig = 1;
    else if (strncmp(line, "process ", 8) == 0) read_process(&gpu->computing, line);
    else if (strncmp(line, "graphics ", 9) == 0) read_process(&gpu->drawing, line);
}

static void read_machine(struct machine *machine)
{
    char line[256];
    const char *path = getenv("NVML_STUB_FILE");
    FILE *file = path ? fopen(path, "r") : NULL;
    memset(machine, 0, sizeof *machine);
    if (!file) return;
    while (fgets(line, sizeof line, file)) {
        struct gpu *next = machine->gpus < MAX_GPUS ? &machine->gpu[machine->gpus] : NULL;
        if (next && sscanf(line, "gpu %79s %95[^\n]", next->uuid, next->name) == 2) machine->gpus++;
        else if (sscanf(line, "driver %79s", machine->driver) == 1) continue;
        else if (sscanf(line, "init_error %d", &machine->init_error) == 1) continue;
        else if (strncmp(line, "hang", 4) == 0) machine->hang = 1;
        else if (machine->gpus) read_gpu_line(&machine->gpu[machine->gpus - 1], line);
    }
    fclose(file);
}

/* The device of a handle as described now; the code with which the call must end if it is not OK. */
static int find(void *handle, struct gpu *found)
{
    static struct machine machine;
    long index = (char *)handle - handles;
    if (!initialised) return UNINITIALIZED;
    read_machine(&machine);
    while (machine.hang) {
        usleep(5000);
        read_machine(&machine);
    }
    if (index < 0 || index >= machine.gpus) return INVALID_ARGUMENT;
    *found = machine.gpu[index];
    return found->error;
}

static int copy_text(char *to, unsigned size, const char *text)
{
    if (strlen(text) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return OK;
}

EXPORT int nvmlInitWithFlags(unsigned flags)
{
    static struct machine machine;
    (void)flags;
    read_machine(&machine);
    if (machine.init_error) return machine.init_error;
    memset(event_delivered, 0, sizeof event_delivered);
    initialised++;
    return OK;
}

EXPORT int nvmlShutdown(void)
{
    if (!initialised) return UNINITIALIZED;
    initialised--;
    return OK;
}

EXPORT const char *nvmlErrorString(int code)
{
    switch (code) {
    case 9: return "Driver Not Loaded";
    case 18: return "Driver/library version mismatch";
    case 999: return "Unknown Error";
    default: return "Error of the stub";
    }
}

EXPORT int nvmlSystemGetDriverVersion(char *version, unsigned size)
{
    static struct machine machine;
    if (!initialised) return UNINITIALIZED;
    read_machine(&machine);
    return copy_text(version, size, machine.driver);
}

EXPORT int nvmlDeviceGetCount_v2(unsigned *count)
{
    static struct machine machine;
    if (!initialised) return UNINITIALIZED;
    read_machine(&machine);
    *count = (unsigned)machine.gpus;
    return OK;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    struct gpu gpu;
    int code = index < MAX_GPUS ? find(&handles[index], &gpu) : INVALID_ARGUMENT;
    if (code == OK) *handle = &handles[index];
    return code;
}

EXPORT int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned size)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    return code ? code : copy_text(uuid, size, gpu.uuid);
}

EXPORT int nvmlDeviceGetName(void *handle, char *name, unsigned size)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    return code ? code : copy_text(name, size, gpu.name);
}

struct memory_v1 { u64 total, free, used; };

EXPORT int nvmlDeviceGetMemoryInfo(void *handle, struct memory_v1 *memory)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    if (code) return code;
    if (gpu.memory_error) return gpu.memory_error;
    if (!gpu.has_memory) return NOT_SUPPORTED;
    memory->total = gpu.total;
    memory->free = gpu.free;
    memory->used = 12345;
    return OK;
}

EXPORT int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    if (code) return code;
    if (!gpu.has_utilization) return NOT_SUPPORTED;
    rates[0] = gpu.utilization;
    rates[1] = gpu.memory_utilization;
    return OK;
}

EXPORT int nvmlDeviceGetTemperature(void *handle, unsigned sensor, unsigned *celsius)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    if (code) return code;
    if (sensor != 0 || !gpu.has_temperature) return NOT_SUPPORTED;
    *celsius = gpu.temperature;
    return OK;
}

EXPORT int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    if (code) return code;
    if (!gpu.has_power) return NOT_SUPPORTED;
    *milliwatts = gpu.power;
    return OK;
}

EXPORT int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *milliwatts)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    if (code) return code;
    if (!gpu.has_power || !gpu.power_limit) return NOT_SUPPORTED;
    *milliwatts = gpu.power_limit;
    return OK;
}

static int event_reasons(void *handle, u64 *mask)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    if (code) return code;
    if (!gpu.has_reasons) return NOT_SUPPORTED;
    *mask = gpu.reasons;
    return OK;
}

EXPORT int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, u64 *mask)
{
    return event_reasons(handle, mask);
}

struct process_info { unsigned pid; u64 bytes; unsigned gpu_instance, compute_instance; };

static int list(const struct processes *processes, unsigned *count, struct process_info *infos)
{
    unsigned room = *count;
    *count = (unsigned)processes->count;
    if (room < *count) return INSUFFICIENT_SIZE;
    for (int i = 0; i < processes->count; i++)
        infos[i] = (struct process_info){processes->process[i].pid, processes->process[i].bytes, ~0u, ~0u};
    return OK;
}

static int computing(void *handle, unsigned *count, struct process_info *infos)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    return code ? code : list(&gpu.computing, count, infos);
}

static int drawing(void *handle, unsigned *count, struct process_info *infos)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    if (code) return code;
    return gpu.drawing.count ? list(&gpu.drawing, count, infos) : NOT_SUPPORTED;
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, struct process_info *infos)
{
    return computing(handle, count, infos);
}

EXPORT int nvmlDeviceGetGraphicsRunningProcesses_v2(void *handle, unsigned *count, struct process_info *infos)
{
    return drawing(handle, count, infos);
}

#ifndef OLD_DRIVER
struct memory_v2 { unsigned version; u64 total, reserved, free, used; };

EXPORT int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory_v2 *memory)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    if (code) return code;
    if (memory->version != (sizeof *memory | 2u << 24)) return VERSION_MISMATCH;
    if (gpu.memory_error) return gpu.memory_error;
    if (!gpu.has_memory) return NOT_SUPPORTED;
    memory->total = gpu.total;
    memory->reserved = gpu.reserved;
    memory->free = gpu.free;
    memory->used = 12345;
    return OK;
}

struct temperature_v1 { unsigned version, sensor; int celsius; };

EXPORT int nvmlDeviceGetTemperatureV(void *handle, struct temperature_v1 *temperature)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    if (code) return code;
    if (temperature->version != (sizeof *temperature | 1u << 24)) return VERSION_MISMATCH;
    if (temperature->sensor != 0 || !gpu.has_temperature) return NOT_SUPPORTED;
    temperature->celsius = (int)gpu.temperature;
    return OK;
}

EXPORT int nvmlDeviceGetCurrentClocksEventReasons(void *handle, u64 *mask)
{
    return event_reasons(handle, mask);
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, struct process_info *infos)
{
    return computing(handle, count, infos);
}

EXPORT int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, struct process_info *infos)
{
    return drawing(handle, count, infos);
}

EXPORT int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    if (code) return code;
    *current = *pending = (unsigned)gpu.mig;
    return OK;
}

/* Events: a device offers Xids alone, as parts without ECC do. */
enum { EVENT_XID = 8 };

static char event_set;

struct event { void *device; u64 type, data; unsigned gpu_instance, compute_instance; };

EXPORT int nvmlEventSetCreate(void **set)
{
    *set = &event_set;
    return OK;
}

EXPORT int nvmlEventSetFree(void *set)
{
    return set == &event_set ? OK : INVALID_ARGUMENT;
}

EXPORT int nvmlDeviceGetSupportedEventTypes(void *handle, u64 *types)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    *types = EVENT_XID;
    return code;
}

EXPORT int nvmlDeviceRegisterEvents(void *handle, u64 types, void *set)
{
    struct gpu gpu;
    int code = find(handle, &gpu);
    if (code) return code;
    return set == &event_set && types == EVENT_XID ? OK : NOT_SUPPORTED;
}

EXPORT int nvmlEventSetWait_v2(void *set, struct event *event, unsigned timeout_ms)
{
    static struct machine machine;
    if (set != &event_set) return INVALID_ARGUMENT;
    read_machine(&machine);
    for (int i = 0; i < machine.gpus; i++) {
        if (!machine.gpu[i].xid || event_delivered[i]) continue;
        event_delivered[i] = 1;
        *event = (struct event){&handles[i], EVENT_XID, (u64)machine.gpu[i].xid, ~0u, ~0u};
        return OK;
    }
    usleep(timeout_ms * 1000);
    return TIMED_OUT;
}
#endif
