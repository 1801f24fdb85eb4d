#pragma once

#include <string>

namespace mgt {

// Multiplications and additions a second of num_threads threads that do nothing else, for about `seconds`: the roof of
// kernels that are bound by arithmetic. In registers alone, by the instructions of the int4 linear layers.
double peak(const std::string& isa, const std::string& dtype, int num_threads, double seconds);

}  // namespace mgt
