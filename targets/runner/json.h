// JSON, read in place: a flat list of nodes over the text, so that a tokenizer of a quarter of a
// million tokens costs 20 bytes a value and no allocation each.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mx::json {

enum class Kind : uint8_t { kNull, kFalse, kTrue, kNumber, kString, kArray, kObject };

class Value;

class Document {
public:
    // Throws Error, beginning with `name`, when `text` is not JSON in UTF-8.
    Document(std::string text, std::string name);
    Document(const Document&) = delete;
    Document& operator=(const Document&) = delete;

    Value root() const;
    const std::string& name() const { return name_; }

private:
    friend class Value;
    friend class Parser;

    struct Node {
        Kind kind;
        uint32_t begin;  // of the text of a string, without escapes, or of a number, as written
        uint32_t size;   // of that text in bytes, or values in an array, or members of an object
        uint32_t end;    // the index of the node behind this one and all in it
    };

    std::string text_;
    std::string name_;
    std::vector<Node> nodes_;
};

// A value of a document, which must outlive it. What asks for another kind throws Error.
class Value {
public:
    Value(const Document* document, uint32_t index) : document_(document), index_(index) {}

    Kind kind() const { return node().kind; }
    bool is_null() const { return kind() == Kind::kNull; }
    bool is_string() const { return kind() == Kind::kString; }
    bool boolean() const;
    int64_t integer() const;      // also checks that it fits
    uint32_t token() const;       // a token's number: not negative, below 2^24
    std::string_view string() const;
    std::string_view number() const;  // as written

    size_t size() const;               // values of an array
    Value at(size_t index) const;      // in an array; for short ones
    Value at(std::string_view key) const;
    std::optional<Value> find(std::string_view key) const;  // nothing for null, too

    // Calls visit(Value) for each value of an array.
    template <typename Visit>
    void each(Visit visit) const {
        expect(Kind::kArray, "a list");
        for (uint32_t i = index_ + 1; i < node().end; i = document_->nodes_[i].end) {
            visit(Value(document_, i));
        }
    }

    // Calls visit(key, Value) for each member of an object.
    template <typename Visit>
    void each_member(Visit visit) const {
        expect(Kind::kObject, "an object");
        for (uint32_t i = index_ + 1; i < node().end; i = document_->nodes_[i + 1].end) {
            visit(Value(document_, i).string(), Value(document_, i + 1));
        }
    }

    // Throws Error: the document's name and `what` is wrong.
    [[noreturn]] void complain(const std::string& what) const;

private:
    const Document::Node& node() const { return document_->nodes_[index_]; }
    std::string_view text() const {
        return std::string_view(document_->text_).substr(node().begin, node().size);
    }
    void expect(Kind kind, const char* name) const;

    const Document* document_;
    uint32_t index_;
};

// The object `value` without member `omit`, as Python's json.dumps(value, sort_keys=True) writes it.
std::string canonical(const Value& value, std::string_view omit = {});

// `text` as a JSON string of ASCII characters.
std::string quoted(std::string_view text);

// A number as JSON; null for what is none.
std::string number(double value);

}  // namespace mx::json
