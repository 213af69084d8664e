// A device of a tracker of TVM's RPC: what python -m tvm.exec.rpc_server is, without Python.
#pragma once

#include <string>

namespace mx {

struct ServeOptions {
    std::string tracker;  // HOST:PORT, where this device is listed
    std::string key;      // what it goes by there
    int port = 9090;      // the first that is tried, of a hundred
};

// Serves one session after another, each in a process and a folder of its own; never comes back.
// Whoever reaches the port can run anything here.
[[noreturn]] void serve(const ServeOptions& options);

}  // namespace mx
