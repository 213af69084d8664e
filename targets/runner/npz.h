// numpy's .npz: a zip archive of arrays; reads stored and deflated ones, writes stored ones.
#pragma once

#include <map>
#include <string>

#include "program.h"

namespace mx {

// The arrays of the file at `path`. Throws Error when it is not an .npz of arrays.
std::map<std::string, Tensor> read_npz(const std::string& path);

void write_npz(const std::string& path, const std::map<std::string, Tensor>& arrays);

}  // namespace mx
