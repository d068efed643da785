// Messages to TensorRT's logger, or to the standard error stream where it gave none.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace vkvx {

void set_logger_finder(nvinfer1::ILoggerFinder* finder);
void log_error(const std::string& text) noexcept;

}  // namespace vkvx
