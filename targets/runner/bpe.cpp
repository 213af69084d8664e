#include "bpe.h"

#include <queue>
#include <tuple>

#include "error.h"
#include "unicode.h"

namespace mx {
namespace {

constexpr uint64_t kNone = UINT64_MAX;

uint64_t hash(std::string_view text) {  // FNV-1a
    uint64_t found = 0xcbf29ce484222325;
    for (const char c : text) found = (found ^ static_cast<unsigned char>(c)) * 0x100000001b3;
    return found ^ found >> 32;
}

uint64_t hash(uint64_t pair) {
    pair *= 0x9e3779b97f4a7c15;
    return pair ^ pair >> 32;
}

size_t power_above(size_t count) {
    size_t size = 16;
    while (size < 2 * count) size *= 2;
    return size;
}

}  // namespace

void Vocabulary::reserve(size_t tokens, size_t bytes) {
    texts_.reserve(bytes);
    entries_.reserve(tokens);
    slots_.assign(power_above(tokens), 0);
}

size_t Vocabulary::slot(std::string_view text) const {
    size_t at = hash(text) & (slots_.size() - 1);
    while (slots_[at] != 0 && text_of(entries_[slots_[at] - 1]) != text) {
        at = (at + 1) & (slots_.size() - 1);
    }
    return at;
}

void Vocabulary::grow() {
    slots_.assign(power_above(entries_.size() + 1), 0);
    for (size_t i = 0; i < entries_.size(); ++i) {
        slots_[slot(text_of(entries_[i]))] = static_cast<uint32_t>(i + 1);
    }
}

void Vocabulary::add(std::string_view text, uint32_t token) {
    if (2 * (entries_.size() + 1) > slots_.size()) grow();
    uint32_t& place = slots_[slot(text)];
    if (place == 0) {
        const Entry entry = {static_cast<uint32_t>(texts_.size()),
                             static_cast<uint32_t>(text.size()), token};
        texts_ += text;
        entries_.push_back(entry);
        place = static_cast<uint32_t>(entries_.size());
    } else {
        entries_[place - 1].token = token;
    }
    if (token >= of_token_.size()) of_token_.resize(token + 1, 0);
    if (of_token_[token] == 0) of_token_[token] = place;
}

std::optional<uint32_t> Vocabulary::token(std::string_view text) const {
    if (slots_.empty()) return std::nullopt;
    const uint32_t place = slots_[slot(text)];
    if (place == 0) return std::nullopt;
    return entries_[place - 1].token;
}

std::optional<std::string_view> Vocabulary::text(uint32_t token) const {
    if (token >= of_token_.size() || of_token_[token] == 0) return std::nullopt;
    return text_of(entries_[of_token_[token] - 1]);
}

Bpe::Bpe(const json::Value& model) {
    const auto kind = model.find("type");
    const std::string_view type = kind ? kind->string() : "BPE";
    if (type != "BPE") {
        unsupported("tokenizer.json holds a " + std::string(type) + " model; mxrun reads BPE");
    }
    if (const auto dropout = model.find("dropout"); dropout && dropout->number() != "0.0") {
        unsupported("tokenizer.json asks for dropout");
    }
    const auto flag = [&](const char* name) {
        const auto found = model.find(name);
        return found && found->boolean();
    };
    fuse_unknown_ = flag("fuse_unk");
    byte_fallback_ = flag("byte_fallback");
    ignore_merges_ = flag("ignore_merges");
    if (const auto found = model.find("continuing_subword_prefix")) prefix_ = found->string();
    if (const auto found = model.find("end_of_word_suffix")) suffix_ = found->string();

    size_t count = 0, bytes = 0;
    const json::Value vocabulary = model.at("vocab");
    vocabulary.each_member([&](std::string_view text, json::Value) {
        ++count;
        bytes += text.size();
    });
    vocabulary_.reserve(count, bytes);
    vocabulary.each_member([&](std::string_view text, json::Value token) {
        vocabulary_.add(text, token.token());
    });
    if (const auto found = model.find("unk_token")) {
        unknown_ = vocabulary_.token(found->string());
        if (!unknown_) found->complain("unk_token is not in the vocabulary");
    }
    read_merges(model.at("merges"));
}

void Bpe::read_merges(const json::Value& merges) {
    merges_.assign(power_above(merges.size()), {kNone, 0, 0});
    uint32_t rank = 0;
    merges.each([&](json::Value merge) {
        if (merge.is_string()) {
            const std::string_view both = merge.string();
            const size_t space = both.find(' ');
            if (space == std::string_view::npos) merge.complain("a merge is not of two tokens");
            add_merge(both.substr(0, space), both.substr(space + 1), rank++, merge);
        } else {
            if (merge.size() != 2) merge.complain("a merge is not of two tokens");
            add_merge(merge.at(size_t{0}).string(), merge.at(1).string(), rank++, merge);
        }
    });
}

void Bpe::add_merge(std::string_view left, std::string_view right, uint32_t rank,
                    const json::Value& where) {
    const auto a = vocabulary_.token(left), b = vocabulary_.token(right);
    const size_t cut = prefix_.size() <= right.size() ? prefix_.size() : 0;
    const auto whole = vocabulary_.token(std::string(left).append(right.substr(cut)));
    if (!a || !b || !whole) where.complain("a merge of tokens that are not in the vocabulary");
    const uint64_t pair = uint64_t{*a} << 32 | *b;
    size_t at = hash(pair) & (merges_.size() - 1);
    while (merges_[at].pair != kNone && merges_[at].pair != pair) at = (at + 1) & (merges_.size() - 1);
    merges_[at] = {pair, rank, *whole};
}

const Bpe::Merge* Bpe::find(uint32_t left, uint32_t right) const {
    const uint64_t pair = uint64_t{left} << 32 | right;
    size_t at = hash(pair) & (merges_.size() - 1);
    while (merges_[at].pair != kNone) {
        if (merges_[at].pair == pair) return &merges_[at];
        at = (at + 1) & (merges_.size() - 1);
    }
    return nullptr;
}

bool Bpe::fall_back(std::string_view character, std::vector<Symbol>& out) const {
    const size_t before = out.size();
    for (const char c : character) {
        constexpr std::string_view kDigits = "0123456789ABCDEF";
        const auto byte = static_cast<unsigned char>(c);
        const char name[] = {'<', '0', 'x', kDigits[byte >> 4], kDigits[byte & 15], '>'};
        const auto token = vocabulary_.token({name, sizeof name});
        if (!token) {
            out.resize(before);
            return false;
        }
        out.push_back({*token, 0, 0});
    }
    return true;
}

// One symbol a character; in the order of the tokenizers library also where that is odd: an unknown
// character comes behind the bytes of those that follow it.
std::vector<Bpe::Symbol> Bpe::symbols(std::string_view word) const {
    std::vector<Symbol> out;
    out.reserve(word.size());
    bool pending = false;
    for (size_t at = 0; at < word.size();) {
        const size_t begin = at;
        next_character(word, at);
        std::string_view character = word.substr(begin, at - begin);
        std::string affixed;
        if ((begin != 0 && !prefix_.empty()) || (at == word.size() && !suffix_.empty())) {
            affixed = (begin != 0 ? prefix_ : "") + std::string(character);
            if (at == word.size()) affixed += suffix_;
            character = affixed;
        }
        if (const auto token = vocabulary_.token(character)) {
            if (pending) out.push_back({*unknown_, 0, 0});
            pending = false;
            out.push_back({*token, 0, 0});
        } else if (!(byte_fallback_ && fall_back(character, out)) && unknown_) {
            if (pending && !fuse_unknown_) out.push_back({*unknown_, 0, 0});
            pending = true;
        }
    }
    if (pending) out.push_back({*unknown_, 0, 0});
    const auto count = static_cast<int32_t>(out.size());
    for (int32_t i = 0; i < count; ++i) {
        out[static_cast<size_t>(i)].previous = i - 1;
        out[static_cast<size_t>(i)].next = i + 1 < count ? i + 1 : -1;
    }
    return out;
}

void Bpe::encode(std::string_view word, std::vector<uint32_t>& tokens) const {
    if (ignore_merges_) {
        if (const auto token = vocabulary_.token(word)) {
            tokens.push_back(*token);
            return;
        }
    }
    constexpr int32_t kRemoved = -2;
    std::vector<Symbol> parts = symbols(word);
    using Candidate = std::tuple<uint32_t, int32_t, uint32_t>;  // rank, place, merged token
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
    const auto part = [&parts](int32_t i) -> Symbol& { return parts[static_cast<size_t>(i)]; };
    const auto consider = [&](int32_t left) {
        if (left < 0 || part(left).next < 0) return;
        const Merge* found = find(part(left).token, part(part(left).next).token);
        if (found != nullptr) queue.emplace(found->rank, left, found->token);
    };
    for (int32_t i = 0; i < static_cast<int32_t>(parts.size()); ++i) consider(i);
    while (!queue.empty()) {
        const auto [rank, left, token] = queue.top();
        queue.pop();
        if (part(left).next < 0) continue;
        const int32_t right = part(left).next;
        const Merge* found = find(part(left).token, part(right).token);
        if (found == nullptr || found->token != token) continue;  // merged otherwise since
        part(left).token = token;
        part(left).next = part(right).next;
        if (part(right).next >= 0) part(part(right).next).previous = left;
        part(right).next = kRemoved;
        consider(part(left).previous);
        consider(left);
    }
    for (const Symbol& symbol : parts) {
        if (symbol.next != kRemoved) tokens.push_back(symbol.token);
    }
}

}  // namespace mx
