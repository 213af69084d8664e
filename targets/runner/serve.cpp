#include "serve.h"

#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <sstream>
#include <thread>

#include "calls.h"
#include "error.h"
#include "json.h"

namespace mx {
namespace {

namespace ffi = tvm::ffi;

// TVM's numbers: of what is said on a connection, and of what a tracker is told.
constexpr int32_t kMagic = 0xFF271, kMismatch = kMagic + 2, kTrackerMagic = 0x2F271;
constexpr int kPut = 3, kUpdateInfo = 5, kPendingKeys = 7;
constexpr int32_t kLongest = 1 << 20;   // of a message
constexpr int kPorts = 100;
constexpr int kPing = 2000;             // ms between questions whether the offer still stands
constexpr int kUnused = 4;              // questions until an offer that was taken counts as unused
constexpr auto kRetry = std::chrono::seconds(5);

// What went wrong with a connection; the server goes on with another.
class Lost : public std::runtime_error {
public:
    explicit Lost(const std::string& what) : std::runtime_error(what + ": " + std::strerror(errno)) {}
};

class Socket {
public:
    explicit Socket(int number) : number_(number) {}
    ~Socket() { close(number_); }
    Socket(const Socket&) = delete;
    Socket& operator=(const Socket&) = delete;
    int number() const { return number_; }

    void send(std::string_view data) const {
        while (!data.empty()) {
            const ssize_t sent = ::send(number_, data.data(), data.size(), MSG_NOSIGNAL);
            if (sent <= 0) throw Lost("send");
            data.remove_prefix(static_cast<size_t>(sent));
        }
    }
    std::string receive(size_t size) const {
        std::string data(size, '\0');
        for (size_t at = 0; at < size;) {
            const ssize_t got = recv(number_, data.data() + at, size - at, 0);
            if (got <= 0) throw Lost("receive");
            at += static_cast<size_t>(got);
        }
        return data;
    }
    // Both machines are little-endian, as are all that TVM's RPC connects.
    void send_number(int32_t value) const {
        send({reinterpret_cast<const char*>(&value), sizeof value});
    }
    int32_t receive_number() const {
        int32_t value = 0;
        std::memcpy(&value, receive(sizeof value).data(), sizeof value);
        return value;
    }
    void send_text(std::string_view text) const {
        send_number(static_cast<int32_t>(text.size()));
        send(text);
    }
    std::string receive_text() const {
        const int32_t size = receive_number();
        if (size < 0 || size > kLongest) throw Lost("a message of " + std::to_string(size) + " bytes");
        return receive(static_cast<size_t>(size));
    }

private:
    int number_;
};

struct Free {
    void operator()(addrinfo* found) const { freeaddrinfo(found); }
};

std::unique_ptr<Socket> connect_to(const std::string& host, const std::string& port) {
    addrinfo hints = {}, *found = nullptr;
    hints.ai_socktype = SOCK_STREAM;
    if (getaddrinfo(host.c_str(), port.c_str(), &hints, &found) != 0) throw Lost("no host " + host);
    const std::unique_ptr<addrinfo, Free> owner(found);
    for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
        auto made = std::make_unique<Socket>(socket(one->ai_family, one->ai_socktype, 0));
        if (connect(made->number(), one->ai_addr, one->ai_addrlen) == 0) return made;
    }
    throw Lost("connect to " + host + ":" + port);
}

// A socket that listens on the first free port; `port` becomes that.
std::unique_ptr<Socket> listen_on(int* port) {
    const int first = *port;
    for (; *port < first + kPorts; ++*port) {
        auto made = std::make_unique<Socket>(socket(AF_INET, SOCK_STREAM, 0));
        sockaddr_in address = {};
        address.sin_family = AF_INET;
        address.sin_port = htons(static_cast<uint16_t>(*port));
        const auto* any = reinterpret_cast<const sockaddr*>(&address);
        const int yes = 1;
        setsockopt(made->number(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
        if (bind(made->number(), any, sizeof address) == 0 && listen(made->number(), 1) == 0) return made;
    }
    fail("no free port from " + std::to_string(first) + " on");
}

// A tracker that this device is listed at.
class Tracker {
public:
    Tracker(const std::string& host, const std::string& port, const std::string& key, int own)
        : socket_(connect_to(host, port)), key_(key), port_(own) {
        socket_->send_number(kTrackerMagic);
        if (socket_->receive_number() != kTrackerMagic) throw Lost("not a tracker");
        ask("[" + std::to_string(kUpdateInfo) + ", {\"key\": " + json::quoted("server:" + key) +
            ", \"addr\": [null, " + std::to_string(own) + "]}]");
    }

    // Offers a session; whoever gets it says the word that is given.
    std::string offer() {
        std::ostringstream word;
        word << key_ << ":0." << std::random_device{}();
        ask("[" + std::to_string(kPut) + ", " + json::quoted(key_) + ", [" + std::to_string(port_) +
            ", " + json::quoted(word.str()) + "], null]");
        return word.str();
    }

    bool stands(const std::string& offer) {
        const std::string pending = ask("[" + std::to_string(kPendingKeys) + "]");
        return pending.find(json::quoted(offer)) != std::string::npos;
    }

private:
    std::string ask(const std::string& message) {
        socket_->send_text(message);
        return socket_->receive_text();
    }

    std::unique_ptr<Socket> socket_;
    std::string key_;
    int port_;
};

// A client that took the offer, or nothing if another came, or none in a while.
std::unique_ptr<Socket> accept_client(const Socket& listening, const std::string& offer,
                                      const std::string& key) {
    pollfd waiting = {listening.number(), POLLIN, 0};
    if (poll(&waiting, 1, kPing) <= 0) return nullptr;
    auto client = std::make_unique<Socket>(accept(listening.number(), nullptr, nullptr));
    const timeval patience = {5, 0};  // for the greeting
    setsockopt(client->number(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    try {
        if (client->receive_number() != kMagic) return nullptr;
        const std::string said = client->receive_text();
        if (said.substr(0, said.find(' ')) != "client:" + offer) {
            client->send_number(kMismatch);
            return nullptr;
        }
        client->send_number(kMagic);
        client->send_text("server:" + key);
    } catch (const Lost&) {  // whoever that was
        return nullptr;
    }
    const timeval forever = {0, 0};
    setsockopt(client->number(), SOL_SOCKET, SO_RCVTIMEO, &forever, sizeof forever);
    return client;
}

// What a session is, in a process of its own: files in `folder`, and TVM's loop.
void run_session(const Socket& client, const std::string& folder) {
    if (chdir(folder.c_str()) != 0) throw Lost(folder);
    const auto place = [folder](const ffi::String& name) {
        return ffi::String((std::filesystem::path(folder) / std::string(name)).string());
    };
    const auto load = [place](const ffi::String& name) { return load_module(place(name)); };
    ffi::Function::SetGlobal("tvm.rpc.server.workpath", offer(place), true);
    ffi::Function::SetGlobal("tvm.rpc.server.load_module", offer(load), true);
    call("rpc.ServerLoop", client.number());
}

void serve_client(std::unique_ptr<Socket> client) {
    std::string folder = (std::filesystem::temp_directory_path() / "mxrun-XXXXXX").string();
    if (mkdtemp(folder.data()) == nullptr) throw Lost(folder);
    const pid_t child = fork();
    if (child < 0) throw Lost("fork");
    if (child == 0) {
        int code = 0;
        try {
            run_session(*client, folder);
        } catch (const std::exception& error) {
            std::fprintf(stderr, "mxrun: a session ended: %s\n", error.what());
            code = 1;
        }
        std::_Exit(code);
    }
    client.reset();
    while (waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
    }
    std::error_code ignored;
    std::filesystem::remove_all(folder, ignored);
}

}  // namespace

void serve(const ServeOptions& options) {
    const size_t colon = options.tracker.rfind(':');
    if (colon == std::string::npos || colon == 0) {
        fail("--tracker '" + options.tracker + "' is not HOST:PORT");
    }
    const std::string host = options.tracker.substr(0, colon);
    const std::string tracker_port = options.tracker.substr(colon + 1);
    int port = options.port;
    const auto listening = listen_on(&port);
    std::fprintf(stderr, "mxrun: serving on port %d, listed as '%s' at %s\n", port,
                 options.key.c_str(), options.tracker.c_str());
    for (std::unique_ptr<Tracker> tracker;;) {
        try {
            if (!tracker) tracker = std::make_unique<Tracker>(host, tracker_port, options.key, port);
            const std::string offer = tracker->offer();
            std::unique_ptr<Socket> client;
            for (int unused = 0; !client && unused < kUnused;) {
                client = accept_client(*listening, offer, options.key);
                unused = client || tracker->stands(offer) ? 0 : unused + 1;
            }
            if (client) serve_client(std::move(client));
        } catch (const Lost& error) {
            std::fprintf(stderr, "mxrun: %s; trying again\n", error.what());
            tracker.reset();
            std::this_thread::sleep_for(kRetry);
        }
    }
}

}  // namespace mx
