// Instruction sets: their names, and which of them this processor and its system let a process use.
#include "isa.h"

#include <cstdlib>
#include <initializer_list>

#if MGT_X86
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// indexed by mgt_isa
constexpr const char* kNames[] = {"auto", "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
constexpr int kNumIsas = sizeof kNames / sizeof *kNames;

#if MGT_X86

// the words that the cpuid instruction returns
enum Register { kEax, kEbx, kEcx, kEdx };

// the registers that a system must save for a process to use them, as bits of XCR0
constexpr uint32_t kYmm = 0x6, kZmm = kYmm | 0xe0, kTiles = 0x60000;

struct Feature {
  const char* name;
  unsigned leaf, subleaf;
  Register word;
  int bit;
  uint32_t registers;
};

constexpr Feature kFeatures[] = {
    {"fma", 1, 0, kEcx, 12, kYmm},        {"f16c", 1, 0, kEcx, 29, kYmm},       {"avx2", 7, 0, kEbx, 5, kYmm},
    {"avx512f", 7, 0, kEbx, 16, kZmm},    {"avx512dq", 7, 0, kEbx, 17, kZmm},   {"avx512bw", 7, 0, kEbx, 30, kZmm},
    {"avx512vl", 7, 0, kEbx, 31, kZmm},   {"avx512vnni", 7, 0, kEcx, 11, kZmm}, {"avx512bf16", 7, 1, kEax, 5, kZmm},
    {"amx-bf16", 7, 0, kEdx, 22, kTiles}, {"amx-tile", 7, 0, kEdx, 24, kTiles}, {"amx-int8", 7, 0, kEdx, 25, kTiles},
};

// the length of the first name of a list "a,b,c"
constexpr size_t name_length(const char* list) {
  size_t length = 0;
  while (list[length] != '\0' && list[length] != ',') ++length;
  return length;
}

constexpr const Feature* find_feature(const char* name, size_t length) {
  for (const Feature& feature : kFeatures) {
    size_t i = 0;
    while (i < length && feature.name[i] == name[i]) ++i;
    if (i == length && feature.name[i] == '\0') return &feature;
  }
  return nullptr;
}

// whether holds(feature) for every name of a list; a name that kFeatures lacks is null
template <class Holds>
constexpr bool all_of_list(const char* list, const Holds& holds) {
  while (*list != '\0') {
    const size_t length = name_length(list);
    if (!holds(find_feature(list, length))) return false;
    list += length;
    if (*list == ',') ++list;
  }
  return true;
}

constexpr bool is_known(const Feature* feature) { return feature != nullptr; }

// indexed by mgt_isa
constexpr const char* kTargets[kNumIsas] = {"",
                                            "",
                                            MGT_AVX2_FEATURES,
                                            MGT_AVX512_FEATURES,
                                            MGT_AVX512_VNNI_FEATURES,
                                            MGT_AVX512_BF16_FEATURES,
                                            MGT_AMX_FEATURES};
// the last one contains the others
static_assert(all_of_list(MGT_AMX_FEATURES, is_known), "a target region uses a feature that kFeatures lacks");

// XCR0, or 0 where the system leaves the instruction out that reads it
uint32_t saved_registers() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || (c >> 27 & 1) == 0) return 0;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Linux hands out the tile registers to those who ask.
bool allow_tiles() {
#if defined(__linux__)
  // ARCH_REQ_XCOMP_PERM for the tile data
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

bool is_present(const Feature& feature) {
  static const uint32_t saved = saved_registers();
  unsigned words[4];
  return (saved & feature.registers) == feature.registers &&
         __get_cpuid_count(feature.leaf, feature.subleaf, &words[kEax], &words[kEbx], &words[kEcx], &words[kEdx]) &&
         (words[feature.word] >> feature.bit & 1) != 0 && (feature.registers != kTiles || allow_tiles());
}

bool probe(int isa) {
  return all_of_list(kTargets[isa], [](const Feature* feature) { return is_present(*feature); });
}

#else

bool probe(int isa) { return isa == MGT_ISA_SCALAR; }

#endif

// asked once: a virtual machine takes longer over cpuid than over a small call
struct Present {
  Present() {
    for (int isa = MGT_ISA_SCALAR; isa < kNumIsas; ++isa) {
      here[isa] = probe(isa);
      if (here[isa]) best = static_cast<mgt_isa>(isa);
    }
  }
  bool here[kNumIsas] = {};
  mgt_isa best = MGT_ISA_SCALAR;
};

const Present& present() {
  static const Present found;
  return found;
}

// what MGT_ISA names: MGT_ISA_AUTO where it is not set, -1 where it is no instruction set
mgt_isa read_environment() {
  const char* wanted = std::getenv("MGT_ISA");
  if (wanted == nullptr || *wanted == '\0') return MGT_ISA_AUTO;
  for (int isa = MGT_ISA_SCALAR; isa < kNumIsas; ++isa)
    if (std::strcmp(wanted, kNames[isa]) == 0) return static_cast<mgt_isa>(isa);
  return static_cast<mgt_isa>(-1);
}

}  // namespace

extern "C" {

const char* mgt_version(void) { return MGT_VERSION; }

const char* mgt_isa_name(mgt_isa isa) { return isa >= MGT_ISA_SCALAR && isa < kNumIsas ? kNames[isa] : nullptr; }

mgt_status mgt_resolve_isa(mgt_isa requested, mgt_isa* isa) {
  if (isa == nullptr) return MGT_INVALID_ARGUMENT;
  if (requested == MGT_ISA_AUTO) {
    // once, because another thread may change the environment at any time
    static const mgt_isa wanted = read_environment();
    requested = wanted == MGT_ISA_AUTO ? present().best : wanted;
  }
  if (mgt_isa_name(requested) == nullptr || !present().here[requested]) return MGT_ISA_UNAVAILABLE;
  *isa = requested;
  return MGT_OK;
}

}  // extern "C"
