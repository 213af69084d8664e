#include "json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <limits>

#include "error.h"
#include "unicode.h"

namespace mx::json {

namespace {
constexpr int kDepth = 64;
}

// Reads a document; strings lose their escapes where they stand, since that never makes one longer.
class Parser {
public:
    explicit Parser(Document& document) : document_(document), text_(document.text_) {}

    void run() {
        skip();
        value(0);
        skip();
        if (at_ != text_.size()) complain("something follows the end");
    }

private:
    [[noreturn]] void complain(const char* what) const {
        fail(document_.name_ + " is not JSON: " + what + " at byte " + std::to_string(at_));
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    void skip() {
        while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) {
            ++at_;
        }
    }

    bool take(std::string_view word) {
        if (std::string_view(text_).substr(at_, word.size()) != word) return false;
        at_ += word.size();
        return true;
    }

    uint32_t open(Kind kind, size_t begin = 0, size_t size = 0) {
        const auto index = static_cast<uint32_t>(document_.nodes_.size());
        document_.nodes_.push_back(
            {kind, static_cast<uint32_t>(begin), static_cast<uint32_t>(size), index + 1});
        return index;
    }

    void close(uint32_t index, uint32_t count) {
        document_.nodes_[index].size = count;
        document_.nodes_[index].end = static_cast<uint32_t>(document_.nodes_.size());
    }

    void value(int depth) {
        if (depth > kDepth) complain("too deeply nested");
        switch (peek()) {
            case '{': return members(depth);
            case '[': return items(depth);
            case '"': return string();
            default: break;
        }
        if (take("null")) {
            open(Kind::kNull);
        } else if (take("true")) {
            open(Kind::kTrue);
        } else if (take("false")) {
            open(Kind::kFalse);
        } else {
            number();
        }
    }

    void items(int depth) {
        const uint32_t index = open(Kind::kArray);
        uint32_t count = 0;
        ++at_;
        skip();
        while (peek() != ']') {
            if (count++ != 0) comma();
            value(depth + 1);
            skip();
        }
        ++at_;
        close(index, count);
    }

    void members(int depth) {
        const uint32_t index = open(Kind::kObject);
        uint32_t count = 0;
        ++at_;
        skip();
        while (peek() != '}') {
            if (count++ != 0) comma();
            if (peek() != '"') complain("no key");
            string();
            skip();
            if (!take(":")) complain("no colon");
            skip();
            value(depth + 1);
            skip();
        }
        ++at_;
        close(index, count);
    }

    void comma() {
        if (!take(",")) complain("no comma");
        skip();
    }

    // Python writes NaN and Infinity too.
    void number() {
        const size_t begin = at_;
        take("-");
        if (!take("Infinity") && !take("NaN")) {
            if (!take("0")) digits();
            if (take(".")) digits();
            if (take("e") || take("E")) {
                if (!take("+")) take("-");
                digits();
            }
        }
        open(Kind::kNumber, begin, at_ - begin);
    }

    void digits() {
        const size_t begin = at_;
        while (peek() >= '0' && peek() <= '9') ++at_;
        if (at_ == begin) complain("no value");
    }

    void string() {
        const size_t begin = ++at_;
        size_t end = begin;
        for (;;) {
            if (at_ >= text_.size()) complain("no end of a string");
            const char c = text_[at_++];
            if (c == '"') break;
            if (static_cast<unsigned char>(c) < 0x20) complain("a control character in a string");
            if (c != '\\') {
                text_[end++] = c;
                continue;
            }
            std::string plain;
            append(plain, escape());
            std::copy(plain.begin(), plain.end(), text_.begin() + static_cast<ptrdiff_t>(end));
            end += plain.size();
        }
        open(Kind::kString, begin, end - begin);
    }

    char32_t escape() {
        if (at_ >= text_.size()) complain("no end of a string");
        constexpr std::string_view kShort = "\"\\/bfnrt";
        constexpr std::string_view kMeaning = "\"\\/\b\f\n\r\t";
        const char c = text_[at_++];
        if (const size_t which = kShort.find(c); which != std::string_view::npos) {
            return static_cast<unsigned char>(kMeaning[which]);
        }
        if (c != 'u') complain("an unknown escape");
        const char32_t first = hex();
        if (first < 0xD800 || first > 0xDFFF) return first;
        if (first > 0xDBFF || !take("\\u")) complain("half a surrogate pair");
        const char32_t second = hex();
        if (second < 0xDC00 || second > 0xDFFF) complain("half a surrogate pair");
        return 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
    }

    char32_t hex() {
        uint32_t code = 0;
        const char* begin = text_.data() + at_;
        const char* end = begin + std::min<size_t>(4, text_.size() - at_);
        const auto found = std::from_chars(begin, end, code, 16);
        if (found.ec != std::errc() || found.ptr != begin + 4) complain("an unknown escape");
        at_ += 4;
        return code;
    }

    Document& document_;
    std::string& text_;
    size_t at_ = 0;
};

Document::Document(std::string text, std::string name)
    : text_(std::move(text)), name_(std::move(name)) {
    if (text_.size() >= std::numeric_limits<uint32_t>::max()) fail(name_ + " is too large");
    if (!is_utf8(text_)) fail(name_ + " is not JSON: not UTF-8");
    // Each value follows one of these; growing instead would take twice the memory at the end.
    nodes_.reserve(1 + static_cast<size_t>(std::count_if(text_.begin(), text_.end(), [](char c) {
        return c == ',' || c == ':' || c == '[' || c == '{';
    })));
    Parser(*this).run();
}

Value Document::root() const { return {this, 0}; }

void Value::complain(const std::string& what) const { fail(document_->name() + ": " + what); }

void Value::expect(Kind kind, const char* name) const {
    if (this->kind() != kind) complain(std::string("a value is not ") + name);
}

bool Value::boolean() const {
    if (kind() != Kind::kTrue && kind() != Kind::kFalse) complain("a value is not true or false");
    return kind() == Kind::kTrue;
}

std::string_view Value::string() const {
    expect(Kind::kString, "a string");
    return text();
}

std::string_view Value::number() const {
    expect(Kind::kNumber, "a number");
    return text();
}

int64_t Value::integer() const {
    const std::string_view digits = number();
    int64_t found = 0;
    const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), found);
    if (result.ec != std::errc() || result.ptr != digits.data() + digits.size()) {
        complain(std::string(digits.substr(0, 40)) + " is not a whole number of 64 bits");
    }
    return found;
}

uint32_t Value::token() const {
    const int64_t found = integer();
    if (found < 0 || found >= 1 << 24) complain(std::to_string(found) + " is not a token's number");
    return static_cast<uint32_t>(found);
}

size_t Value::size() const {
    expect(Kind::kArray, "a list");
    return node().size;
}

Value Value::at(size_t index) const {
    if (index >= size()) complain("a list is too short");
    uint32_t i = index_ + 1;
    while (index-- != 0) i = document_->nodes_[i].end;
    return {document_, i};
}

Value Value::at(std::string_view key) const {
    std::optional<Value> found;
    each_member([&](std::string_view name, Value value) {
        if (name == key) found = value;
    });
    if (!found) complain("no \"" + std::string(key) + "\"");
    return *found;
}

std::optional<Value> Value::find(std::string_view key) const {
    std::optional<Value> found;
    each_member([&](std::string_view name, Value value) {
        if (name == key) found = value;
    });
    if (found && found->is_null()) found.reset();
    return found;
}

std::string quoted(std::string_view text) {
    constexpr std::string_view kSpecial = "\"\\\b\f\n\r\t";
    constexpr std::string_view kShort = "\"\\bfnrt";
    std::string out = "\"";
    const auto escape = [&out](uint32_t unit) {
        out += "\\u";
        for (int shift = 12; shift >= 0; shift -= 4) out += "0123456789abcdef"[unit >> shift & 15];
    };
    for (size_t at = 0; at < text.size();) {
        const char32_t c = next_character(text, at);
        const size_t which = c < 0x80 ? kSpecial.find(static_cast<char>(c)) : std::string_view::npos;
        if (which != std::string_view::npos) {
            out += '\\';
            out += kShort[which];
        } else if (c >= 0x20 && c < 0x7F) {
            out += static_cast<char>(c);
        } else if (c < 0x10000) {
            escape(c);
        } else {
            escape(0xD800 + ((c - 0x10000) >> 10));
            escape(0xDC00 + ((c - 0x10000) & 0x3FF));
        }
    }
    return out + '"';
}

std::string number(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.17g", value);
    return std::isfinite(value) ? text : "null";
}

std::string canonical(const Value& value, std::string_view omit) {
    switch (value.kind()) {
        case Kind::kNull: return "null";
        case Kind::kFalse: return "false";
        case Kind::kTrue: return "true";
        case Kind::kNumber: return std::string(value.number());
        case Kind::kString: return quoted(value.string());
        case Kind::kArray: {
            std::string out = "[";
            value.each([&](Value item) {
                if (out.size() > 1) out += ", ";
                out += canonical(item);
            });
            return out + "]";
        }
        case Kind::kObject: break;
    }
    std::vector<std::pair<std::string_view, Value>> members;
    value.each_member([&](std::string_view key, Value member) {
        if (omit.empty() || key != omit) members.emplace_back(key, member);
    });
    // Python sorts by character, which is the order of UTF-8's bytes.
    std::sort(members.begin(), members.end(),
              [](const auto& a, const auto& b) { return a.first < b.first; });
    std::string out = "{";
    for (size_t i = 0; i < members.size(); ++i) {
        if (i != 0 && members[i].first == members[i - 1].first) value.complain("a key twice");
        if (i != 0) out += ", ";
        out += quoted(members[i].first) + ": " + canonical(members[i].second);
    }
    return out + "}";
}

}  // namespace mx::json
