#include "isa.h"
#include "match_tokens/op.h"

#if MGT_X86
MGT_TARGET_AVX2_BEGIN
#include "simd_scalar.h"
#include "simd_avx2.h"
#include "halves.h"
#include "match_tokens/body.h"

namespace mgt {

const MatchTokens match_tokens_avx2 = {pack_panel<Avx2>, compare_sources<Avx2, 1>};

}  // namespace mgt

MGT_TARGET_END
#endif
