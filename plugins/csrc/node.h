// A node of the operator's table, whatever framework runs it: what its attributes and the shapes of
// a call make of VkvxParams.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "operator_table.h"

namespace vkvx {

// What was asked for cannot be done; the text names what was given and what was expected.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline constexpr int kMostAxes = 8;

// The shape of a tensor of a call.
struct Extents {
  int rank = 0;
  int64_t sizes[kMostAxes] = {};
};

// The position of `given` among `names`; throws Error, in which `what` was given.
template <int kCount>
int number_of(const char* what, const std::string& given, const char* const (&names)[kCount]) {
  std::string known;
  for (int i = 0; i < kCount; ++i) {
    if (given == names[i]) return i;
    known += (i ? ", " : "") + std::string(names[i]);
  }
  throw Error(std::string(what) + " is '" + given + "'; give one of " + known);
}

// Throws what the library complains of.
void check(int code);

// Throws Error for attributes that the library does not take, whatever the shapes are.
void check_attributes(const Attributes& attributes);

// How many inputs a node with these attributes has, and input i of them.
int input_count(const Attributes& attributes);
const Tensor& input(const Attributes& attributes, int i);
// The input whose type and shape output i has.
const Tensor& output(const Attributes& attributes, int i);

// Throws Error unless a node with these attributes has this many.
void check_counts(const Attributes& attributes, int inputs, int outputs);

// Attributes and sizes of a call: all of VkvxParams but addresses, strides and workspace. `dtype`
// is VKVX_FLOAT16 to VKVX_FLOAT32. With `exact` every tensor has to agree on a size; otherwise the
// greatest counts, as upper bounds of shapes need not agree. Throws Error.
VkvxParams call_params(const Attributes& attributes, int32_t dtype,
                       const std::vector<Extents>& inputs, bool exact);

// Sets addresses and strides of a call whose tensors are contiguous. Caches are updated where the
// outputs lie; those that do not share the memory of their input start as copies of it. Outputs
// that are null are not wanted: then the caches are only read. Throws Error.
void set_addresses(VkvxParams& params, const Attributes& attributes,
                   const std::vector<Extents>& shapes, const void* const* inputs,
                   void* const* outputs, cudaStream_t stream);

// Zeroes what has to be zero of a workspace that others write to between calls. Throws Error, also
// if there is too little of it.
void clear_workspace(const VkvxParams& params, cudaStream_t stream);

}  // namespace vkvx
