// The small entry points together: mgt_philox, mgt_gaussian, mgt_resolve_isa, mgt_kernel_isa, mgt_isa_name,
// mgt_version.
#include <string>

#include "fuzz.h"

using namespace fuzz;

namespace {

// draw(context, output): of `length` elements where the arguments are documented, of none where not
template <class T, class Draw>
void check(mgt_context c, unsigned state, bool documented, int64_t length, const Draw& draw) {
  Buffer<T> first(documented ? length : 0), other(documented ? length : 0);
  first.poison();
  const mgt_status status = call_in(state, [&] { return draw(c, first.data()); });
  if (!documented || c.num_threads < 1) {
    REQUIRE(status == MGT_INVALID_ARGUMENT || (status == MGT_ISA_UNAVAILABLE && !available(c.isa)));
    return;
  }
  REQUIRE(status == (available(c.isa) ? MGT_OK : MGT_ISA_UNAVAILABLE));
  if (status != MGT_OK) return;
  for (const mgt_isa isa : vector_isas()) {
    c.isa = isa;
    other.poison();
    REQUIRE(call_in(state, [&] { return draw(c, other.data()); }) == MGT_OK);
    REQUIRE(other.same_bits(first));
  }
}

void check_names(Input& input) {
  counter.num_calls += 4;
  const auto isa = input.enumerator<mgt_isa>(MGT_ISA_AMX);
  const bool listed = isa >= MGT_ISA_SCALAR && isa <= MGT_ISA_AMX;
  REQUIRE((mgt_isa_name(isa) != nullptr) == listed);
  mgt_isa resolved = MGT_ISA_AUTO;
  const mgt_status status = mgt_resolve_isa(isa, &resolved);
  REQUIRE(status == (available(isa) ? MGT_OK : MGT_ISA_UNAVAILABLE));
  if (status == MGT_OK) REQUIRE(available(resolved) && resolved != MGT_ISA_AUTO && (resolved == isa || !listed));
  REQUIRE(mgt_resolve_isa(isa, nullptr) == MGT_INVALID_ARGUMENT);
  const std::string op = input.coin()
                             ? input.one_of<const char*>({"sample_tokens", "differential_sample", "mask_by_confidence",
                                                          "commit_tokens", "w4a8_linear", "w4a16_linear"})
                             : "sample_token";
  mgt_isa kernel = MGT_ISA_AUTO;
  const mgt_status found = mgt_kernel_isa(op.c_str(), isa, &kernel);
  REQUIRE(found == (listed && op != "sample_token" ? MGT_OK : MGT_INVALID_ARGUMENT));
  if (found == MGT_OK) REQUIRE(kernel >= MGT_ISA_SCALAR && kernel <= isa);
  REQUIRE(mgt_kernel_isa(nullptr, isa, &kernel) == MGT_INVALID_ARGUMENT);
  REQUIRE(std::string(mgt_version()) == MGT_VERSION);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  check_names(input);
  const mgt_context c = context(input);
  const unsigned state = float_state(input);
  const auto seed = input.any<int64_t>();
  const auto position = input.any<uint32_t>(), step = input.any<uint32_t>();
  if (input.coin()) {
    const auto stream = input.any<uint32_t>();
    const int64_t first = input.size(0, int64_t{1} << 32), num = input.size(0, 40);
    const bool documented = first >= 0 && num >= 0 && Wide{first} + num <= Wide{1} << 32;
    if (documented && num > kMostElements) return -1;
    check<uint32_t>(c, state, documented, documented ? 4 * num : 0, [&](const mgt_context& where, uint32_t* words) {
      return mgt_philox(&where, seed, position, step, stream, first, num, words);
    });
  } else {
    const int64_t num = input.size(0, input.rarely(64) ? 5000 : 40);
    const bool documented = num >= 0 && num <= INT32_MAX;
    if (documented && num > kMostElements) return -1;
    check<float>(c, state, documented, num, [&](const mgt_context& where, float* noise) {
      return mgt_gaussian(&where, seed, position, step, num, noise);
    });
  }
  return 0;
}
