// mgt_w4a16_linear and its workspace query.
#include "int4_linear.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return fuzz::fuzz_linear<false>(data, size); }
