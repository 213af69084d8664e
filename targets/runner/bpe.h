// Byte-pair encoding: words to tokens, by merges in the order of their rank.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "json.h"

namespace mx {

// A two-way map of tokens' texts and numbers: one string, a table of places, open addressing.
class Vocabulary {
public:
    void reserve(size_t tokens, size_t bytes);
    void add(std::string_view text, uint32_t token);  // the first text of a number is its text
    std::optional<uint32_t> token(std::string_view text) const;
    std::optional<std::string_view> text(uint32_t token) const;

private:
    struct Entry {
        uint32_t begin, size, token;
    };

    std::string_view text_of(const Entry& entry) const {
        return std::string_view(texts_).substr(entry.begin, entry.size);
    }
    size_t slot(std::string_view text) const;
    void grow();

    std::string texts_;
    std::vector<Entry> entries_;
    std::vector<uint32_t> slots_;    // an entry's index + 1, or 0
    std::vector<uint32_t> of_token_; // likewise
};

class Bpe {
public:
    // Reads the "model" of a tokenizer.json. Throws Error when it is not BPE or inconsistent.
    explicit Bpe(const json::Value& model);

    // Appends the tokens of `word`.
    void encode(std::string_view word, std::vector<uint32_t>& tokens) const;

    const Vocabulary& vocabulary() const { return vocabulary_; }

private:
    struct Merge {
        uint64_t pair;  // left << 32 | right; kNone in an empty slot
        uint32_t rank, token;
    };
    struct Symbol {
        uint32_t token;
        int32_t previous, next;  // -1 at the ends; removed ones have next -2
    };

    void read_merges(const json::Value& merges);
    void add_merge(std::string_view left, std::string_view right, uint32_t rank,
                   const json::Value& where);
    const Merge* find(uint32_t left, uint32_t right) const;
    std::vector<Symbol> symbols(std::string_view word) const;
    bool fall_back(std::string_view character, std::vector<Symbol>& out) const;

    Vocabulary vocabulary_;
    std::vector<Merge> merges_;  // open addressing; its size is a power of 2
    std::optional<uint32_t> unknown_;
    std::string prefix_, suffix_;  // of characters that do not begin a word, or end it
    bool fuse_unknown_ = false;
    bool byte_fallback_ = false;
    bool ignore_merges_ = false;
};

}  // namespace mx
