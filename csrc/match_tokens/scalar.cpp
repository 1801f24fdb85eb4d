#include "isa.h"
#include "match_tokens/op.h"

#include "simd_scalar.h"
#include "halves.h"
#include "match_tokens/body.h"

namespace mgt {

const MatchTokens match_tokens_scalar = {pack_panel<Scalar16>, compare_sources<Scalar16, 1>};

}  // namespace mgt
