/* Worker threads of gloo that are slow to let go of a finished message: preloaded by ending.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

/* Any time up to LINGER_MS milliseconds. */
static void linger(void)
{
    const char *most = getenv("LINGER_MS");
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (most && atoi(most) > 0)
        usleep(now.tv_nsec / 7 % (1000L * atoi(most)));
}

/* ProcessGroupGloo::AsyncWork::execute; its caller drops the message afterwards. */
#define EXECUTE(name)                                                                             \
    void name(void *work)                                                                         \
    {                                                                                             \
        void *torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);                          \
        ((void (*)(void *))dlsym(torch, #name))(work);                                            \
        linger();                                                                                 \
    }

/* By reference, as in torch 2.14, and by value. */
EXECUTE(_ZN4c10d16ProcessGroupGloo9AsyncWork7executeERKN3c1013intrusive_ptrIS1_NS2_6detail34intrusive_target_default_null_typeIS1_EEEE)
EXECUTE(_ZN4c10d16ProcessGroupGloo9AsyncWork7executeEN3c1013intrusive_ptrIS1_NS2_6detail34intrusive_target_default_null_typeIS1_EEEE)
