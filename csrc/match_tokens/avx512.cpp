#include "isa.h"
#include "match_tokens/op.h"

#if MGT_X86
MGT_TARGET_AVX512_BEGIN
#include "simd_scalar.h"
#include "simd_avx512.h"
#include "halves.h"
#include "match_tokens/body.h"

namespace mgt {

const MatchTokens match_tokens_avx512 = {pack_panel<Avx512>, compare_sources<Avx512, 2>};

}  // namespace mgt

MGT_TARGET_END
#endif
