/* Which instruction sets run here: the CPU's bits (cpuid), the operating system's grant of the
 * registers (XCR0), and for AMX tiles its answer to a request (arch_prctl). Source: Intel SDM
 * volume 2A, CPUID, and volume 1, 13 (XSAVE); Linux Documentation/arch/x86/xstate.rst.
 */
#include "ktl.h"

#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { EAX, EBX, ECX, EDX };
enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };

/* What an instruction set needs beyond those of the one it is built on. */
typedef struct {
    const char *name; /* NULL ends a list */
    unsigned leaf, subleaf;
    int reg, bit;
} feature;

static const feature FMA3[] = {{"osxsave", 1, 0, ECX, 27}, {"avx", 1, 0, ECX, 28}, {"fma", 1, 0, ECX, 12},
                               {"f16c", 1, 0, ECX, 29},    {"avx2", 7, 0, EBX, 5}, {NULL, 0, 0, 0, 0}};
static const feature VNNI[] = {{"avx512f", 7, 0, EBX, 16},    {"avx512dq", 7, 0, EBX, 17},
                               {"avx512bw", 7, 0, EBX, 30},   {"avx512vl", 7, 0, EBX, 31},
                               {"avx512_vnni", 7, 0, ECX, 11}, {"bmi2", 7, 0, EBX, 8},
                               {NULL, 0, 0, 0, 0}};
static const feature BF16[] = {{"avx512_bf16", 7, 1, EAX, 5}, {NULL, 0, 0, 0, 0}};
static const feature AMX_INT8[] = {{"amx_tile", 7, 0, EDX, 24}, {"amx_int8", 7, 0, EDX, 25}, {NULL, 0, 0, 0, 0}};
static const feature AMX_BF16[] = {{"amx_tile", 7, 0, EDX, 24}, {"amx_bf16", 7, 0, EDX, 22}, {NULL, 0, 0, 0, 0}};

/* `base`: few tokens run on it, so it must be usable too; -1 for none. `xcr0`: register states that
 * the operating system must save (1 SSE, 2 AVX, 5..7 AVX-512, 17 and 18 tiles). */
static const struct {
    const char *name;
    const feature *needs;
    int base;
    unsigned xcr0;
    const char *state;
} ISA[KTL_ISAS] = {
    [KTL_SERIAL] = {"serial", NULL, -1, 0, ""},
    [KTL_AVX2] = {"avx2", FMA3, -1, 0x6, "AVX"},
    [KTL_AVX512_VNNI] = {"avx512_vnni", VNNI, KTL_AVX2, 0xe6, "AVX-512"},
    [KTL_AVX512_BF16] = {"avx512_bf16", BF16, KTL_AVX512_VNNI, 0xe6, "AVX-512"},
    [KTL_AMX_INT8] = {"amx_int8", AMX_INT8, KTL_AVX512_VNNI, 0x60000, "AMX tile"},
    [KTL_AMX_BF16] = {"amx_bf16", AMX_BF16, KTL_AVX512_VNNI, 0x60000, "AMX tile"},
    [KTL_AMX_INT8_EMULATED] = {"amx_int8_emulated", NULL, -1, 0, ""},
    [KTL_AMX_BF16_EMULATED] = {"amx_bf16_emulated", NULL, -1, 0, ""},
};

const char *ktl_isa_name(int isa) {
    return isa >= 0 && isa < KTL_ISAS ? ISA[isa].name : NULL;
}

int ktl_isa_of(const char *name) {
    for (int isa = 0; name && isa < KTL_ISAS; isa++)
        if (strcmp(name, ISA[isa].name) == 0)
            return isa;
    return KTL_ERR_ISA;
}

enum { REASON_BYTES = 320 };
static char reasons[KTL_ISAS][REASON_BYTES];

static void add(char *text, const char *form, ...) __attribute__((format(printf, 2, 3)));
static void add(char *text, const char *form, ...) {
    size_t used = strlen(text);
    va_list arguments;
    va_start(arguments, form);
    vsnprintf(text + used, REASON_BYTES - used, form, arguments);
    va_end(arguments);
}

static int cpu_has(const feature *f) {
    unsigned regs[4] = {0, 0, 0, 0};
    __get_cpuid_count(f->leaf, f->subleaf, &regs[EAX], &regs[EBX], &regs[ECX], &regs[EDX]);
    return regs[f->reg] >> f->bit & 1;
}

static char vendor[13];

static void ask_vendor(void) {
    unsigned leaf, part[3] = {0, 0, 0};
    if (__get_cpuid(0, &leaf, &part[0], &part[2], &part[1])) memcpy(vendor, part, sizeof part);
}

const char *ktl_cpu_vendor(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, ask_vendor);
    return vendor;
}

static int pairs_wanted = -1;

int ktl_pairs(int isa) {
    if (isa != KTL_AVX2 && isa != KTL_AVX512_VNNI) return 0;
    if (pairs_wanted >= 0) return pairs_wanted;
    return isa == KTL_AVX2 || strcmp(ktl_cpu_vendor(), "AuthenticAMD") == 0;
}

void ktl_set_pairs(int pairs) { pairs_wanted = pairs; }

/* Only after osxsave was seen: without it the instruction faults. */
static uint64_t granted_states(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static void judge(int isa) {
    static const char REG[4][4] = {"EAX", "EBX", "ECX", "EDX"};
    char *reason = reasons[isa];
    if (!ISA[isa].needs)
        return;
    for (const feature *f = ISA[isa].needs; f->name; f++)
        if (!cpu_has(f))
            add(reason, "%s%s (cpuid %u.%u %s %d)", *reason ? ", " : "the CPU lacks ", f->name,
                f->leaf, f->subleaf, REG[f->reg], f->bit);
    if (*reason)
        return;
    if (ISA[isa].base >= 0 && reasons[ISA[isa].base][0]) {
        add(reason, "few tokens need %s: ", ISA[ISA[isa].base].name);
        add(reason, "%s", reasons[ISA[isa].base]);
        return;
    }
    uint64_t states = granted_states();
    if ((states & ISA[isa].xcr0) != ISA[isa].xcr0) {
        add(reason, "the operating system does not grant %s registers (XCR0 is 0x%llx, needs 0x%x)",
            ISA[isa].state, (unsigned long long)states, ISA[isa].xcr0);
        return;
    }
    if (isa != KTL_AMX_INT8 && isa != KTL_AMX_BF16)
        return;
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) != 0)
        add(reason, "the operating system does not grant AMX tiles "
                    "(arch_prctl(ARCH_REQ_XCOMP_PERM) failed: %s)", strerror(errno));
}

static void judge_all(void) {
    for (int isa = 0; isa < KTL_ISAS; isa++) /* in order: a base stands before what needs it */
        judge(isa);
}

const char *ktl_isa_reason(int isa) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (isa < 0 || isa >= KTL_ISAS)
        return "there is no such instruction set";
    pthread_once(&once, judge_all);
    return reasons[isa];
}
