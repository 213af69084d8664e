// The C interface for C++: handles that free themselves, and errors that are thrown.
#pragma once

#include <memory>

#include "error.h"
#include "mxrun.h"

namespace mx {

struct CloseModel {
    void operator()(mx_model* model) const { mx_close(model); }
};
struct EndSession {
    void operator()(mx_session* session) const { mx_end(session); }
};
using ModelHandle = std::unique_ptr<mx_model, CloseModel>;
using SessionHandle = std::unique_ptr<mx_session, EndSession>;

// Turns what the C interface says back into an error.
inline void check(int code) {
    if (code != 0) throw Error(static_cast<Exit>(code), mx_error());
}

inline ModelHandle open_model(const std::string& path) {
    mx_model* opened = nullptr;
    check(mx_open(path.c_str(), &opened));
    return ModelHandle(opened);
}

inline SessionHandle start_session(mx_model* model, int64_t context) {
    mx_session* started = nullptr;
    check(mx_start(model, static_cast<uint32_t>(context), &started));
    return SessionHandle(started);
}

}  // namespace mx
