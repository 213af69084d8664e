#include "unicode.h"

#include <algorithm>
#include <iterator>
#include <vector>

namespace mx {
namespace {

struct Decomposition {
    char32_t whole, first, second;
    bool composes;
};

#include "unicode_tables.inc"

// The value of the run that `c` is in; `bits` of an entry hold it.
template <size_t N>
uint32_t find_run(const uint32_t (&runs)[N], char32_t c, int bits) {
    const uint32_t last = static_cast<uint32_t>(c) << bits | ((1u << bits) - 1);
    return *(std::upper_bound(std::begin(runs), std::end(runs), last) - 1) & ((1u << bits) - 1);
}

uint32_t combining_class(char32_t c) { return c < 0x300 ? 0 : find_run(kCombiningRuns, c, 8); }

// Hangul syllables are composed by arithmetic (Unicode, section 3.12).
constexpr char32_t kHangul = 0xAC00, kLeading = 0x1100, kVowel = 0x1161, kTrailing = 0x11A7;
constexpr char32_t kLeadings = 19, kVowels = 21, kTrailings = 28;

void decompose(std::u32string& out, char32_t c) {
    if (c < 0xC0) {
        out += c;
    } else if (c >= kHangul && c < kHangul + kLeadings * kVowels * kTrailings) {
        const char32_t index = c - kHangul;
        out += kLeading + index / (kVowels * kTrailings);
        out += kVowel + index / kTrailings % kVowels;
        if (index % kTrailings != 0) out += kTrailing + index % kTrailings;
    } else {
        const auto* found =
            std::lower_bound(std::begin(kDecompositions), std::end(kDecompositions), c,
                             [](const Decomposition& row, char32_t x) { return row.whole < x; });
        if (found == std::end(kDecompositions) || found->whole != c) {
            out += c;
            return;
        }
        decompose(out, found->first);
        if (found->second != 0) out += found->second;  // never decomposes further
    }
}

// The character that `first` and `second` make, or 0.
char32_t compose(char32_t first, char32_t second) {
    const char32_t leading = first - kLeading, vowel = second - kVowel;
    if (leading < kLeadings && vowel < kVowels) {
        return kHangul + (leading * kVowels + vowel) * kTrailings;
    }
    const char32_t syllable = first - kHangul, trailing = second - kTrailing;
    if (syllable < kLeadings * kVowels * kTrailings && syllable % kTrailings == 0 &&
        trailing - 1 < kTrailings - 1) {
        return first + trailing;
    }
    static const std::vector<Decomposition> pairs = [] {
        std::vector<Decomposition> found;
        std::copy_if(std::begin(kDecompositions), std::end(kDecompositions),
                     std::back_inserter(found),
                     [](const Decomposition& row) { return row.composes && row.second != 0; });
        std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
            return a.first != b.first ? a.first < b.first : a.second < b.second;
        });
        return found;
    }();
    const auto found = std::lower_bound(
        pairs.begin(), pairs.end(), std::pair(first, second), [](const auto& row, const auto& x) {
            return row.first != x.first ? row.first < x.first : row.second < x.second;
        });
    const bool equal = found != pairs.end() && found->first == first && found->second == second;
    return equal ? found->whole : 0;
}

}  // namespace

Category category(char32_t c) {
    return c > 0x10FFFF ? Category::Cn : static_cast<Category>(find_run(kCategoryRuns, c, 5));
}

uint32_t category_mask(std::string_view name) {
    constexpr std::string_view kNames =
        "LuLlLtLmLoMnMcMeNdNlNoPcPdPsPePiPfPoSmScSkSoZsZlZpCcCfCsCoCn";
    uint32_t mask = 0;
    for (int i = 0; i < kCategories; ++i) {
        const std::string_view found = kNames.substr(2 * static_cast<size_t>(i), 2);
        if (found == name || (name.size() == 1 && found[0] == name[0])) mask |= 1u << i;
    }
    return mask;
}

bool is_space(char32_t c) { return (find_run(kFlagRuns, c, 2) & 1) != 0; }

bool is_word(char32_t c) { return (find_run(kFlagRuns, c, 2) & 2) != 0; }

char32_t next_character(std::string_view text, size_t& at) {
    const auto byte = [&text](size_t i) {
        return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u;
    };
    const uint32_t lead = byte(at++);
    if (lead < 0x80) return lead;
    int more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
    if (lead < 0xC2 || lead > 0xF4) return kReplacement;
    // The second byte's range keeps overlong forms, surrogates and what is beyond U+10FFFF out.
    uint32_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    uint32_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    char32_t c = lead & (0x3F >> more);
    for (; more != 0; --more) {
        const uint32_t next = byte(at);
        if (next < low || next > high) return kReplacement;
        c = c << 6 | (next & 0x3F);
        low = 0x80, high = 0xBF;
        ++at;
    }
    return c;
}

std::u32string to_characters(std::string_view text) {
    std::u32string out;
    out.reserve(text.size());
    for (size_t at = 0; at < text.size();) out += next_character(text, at);
    return out;
}

void append(std::string& text, char32_t c) {
    const auto add = [&text](uint32_t byte) { text += static_cast<char>(byte); };
    if (c < 0x80) {
        add(c);
    } else if (c < 0x800) {
        add(0xC0 | c >> 6);
        add(0x80 | (c & 0x3F));
    } else if (c < 0x10000) {
        add(0xE0 | c >> 12);
        add(0x80 | (c >> 6 & 0x3F));
        add(0x80 | (c & 0x3F));
    } else {
        add(0xF0 | c >> 18);
        add(0x80 | (c >> 12 & 0x3F));
        add(0x80 | (c >> 6 & 0x3F));
        add(0x80 | (c & 0x3F));
    }
}

std::string to_utf8(std::u32string_view characters) {
    std::string out;
    out.reserve(characters.size());
    for (char32_t c : characters) append(out, c);
    return out;
}

bool is_utf8(std::string_view text) {
    for (size_t at = 0; at < text.size();) {
        const size_t begin = at;
        const bool replaced = next_character(text, at) == kReplacement;
        if (replaced && text.substr(begin, at - begin) != "\xEF\xBF\xBD") return false;
    }
    return true;
}

std::string lossy(std::string_view bytes) {
    std::string out;
    out.reserve(bytes.size());
    for (size_t at = 0; at < bytes.size();) append(out, next_character(bytes, at));
    return out;
}

std::string nfc(std::string_view text) {
    std::u32string parts;
    for (size_t at = 0; at < text.size();) decompose(parts, next_character(text, at));
    // Combining marks of one base come in the order of their classes.
    for (size_t i = 0; i < parts.size();) {
        size_t end = i + 1;
        if (combining_class(parts[i]) != 0) {
            while (end < parts.size() && combining_class(parts[end]) != 0) ++end;
            std::stable_sort(parts.begin() + static_cast<ptrdiff_t>(i),
                             parts.begin() + static_cast<ptrdiff_t>(end), [](char32_t a, char32_t b) {
                                 return combining_class(a) < combining_class(b);
                             });
        }
        i = end;
    }
    std::u32string out;
    size_t starter = std::u32string::npos;
    uint32_t last = 0;  // the class of what stands between the starter and here
    for (char32_t c : parts) {
        const uint32_t own = combining_class(c);
        const bool adjacent = starter != std::u32string::npos && out.size() == starter + 1;
        if (starter != std::u32string::npos && (adjacent || last < own)) {
            if (const char32_t whole = compose(out[starter], c)) {
                out[starter] = whole;
                continue;
            }
        }
        if (own == 0) starter = out.size();
        last = own;
        out += c;
    }
    return to_utf8(out);
}

}  // namespace mx
