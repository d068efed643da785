// vkvx::VisualKVAttention as a custom operator of onnxruntime's CUDA provider.
#pragma once

#include <vector>

#include "api.h"

namespace vkvx::ort {

// One for each type of the model and of text rows: onnxruntime chooses by the types of a node. They
// live as long as the library.
std::vector<const CustomOp*> custom_ops(const Api* api);

// Throws Error with onnxruntime's reason, if there is one.
void check(const Api* api, Status* status);

}  // namespace vkvx::ort
