/**
 * TeX as MathML. Formulas come from models and documents, so neither their size, nor the time to
 * render them, nor where they are painted may be theirs to decide.
 */

import temml from "temml";
import "temml/dist/Temml-Local.css";
import "./styles/formulas.css";

const MAX_SOURCE = 5_000; // characters; longer formulas stay text
const MAX_MATHML = 300_000; // characters
const MAX_DEPTH = 100; // of elements: layout takes exponential time in some of them
const MAX_EXPANSIONS = 1_000;
const MAX_EXPANDED = 100_000; // characters of all expansions of macros that a formula defines
const DEFINES = /\\(?:[gex]?def|(?:re|provide)?newcommand|renewcommand|(?:future)?let)(?![a-zA-Z])/;

/** MathML, with the styles that may be set in `data-css`. Throws for what cannot be rendered. */
export function toMathMl(source: string, displayMode: boolean): string {
  if (source.length > MAX_SOURCE) throw new RangeError("formula too long");
  // A macro may stand for the rest of the formula.
  const maxExpand = DEFINES.test(source)
    ? Math.min(MAX_EXPANSIONS, Math.floor(MAX_EXPANDED / source.length))
    : MAX_EXPANSIONS;
  // Untrusted: no \href, \includegraphics or \class.
  return bounded(temml.renderToString(source, { displayMode, maxExpand, trust: false, throwOnError: true }));
}

/** Lengths up to these many em, forward and backward. */
const LIMITS = { width: [20, 3], height: [6, 3], thickness: [1, 0], font: [3, 0] } as const;
type Limit = (typeof LIMITS)[keyof typeof LIMITS];

// Temml's lengths; other attributes have none.
const ATTRIBUTES = new Map<string, Limit>([
  ["width", LIMITS.width], ["lspace", LIMITS.width], ["rspace", LIMITS.width],
  ["columnspacing", LIMITS.width], ["height", LIMITS.height], ["depth", LIMITS.height],
  ["voffset", LIMITS.height], ["minsize", LIMITS.height], ["maxsize", LIMITS.height],
  ["rowspacing", LIMITS.height], ["linethickness", LIMITS.thickness], ["mathsize", LIMITS.font],
]); // prettier-ignore

const EM = new Map([["em", 1], ["ex", 0.45], ["pt", 1 / 12], ["px", 1 / 16], ["mu", 1 / 18], ["", 1 / 16]]);

/** A length within the limits; what is not a length of TeX's is 0. */
function bound(length: string, [forward, back]: Limit): string {
  // Shares of the content or of the line are bounded by it.
  if (/^[+-]?(?:0?\.5|1|0)(?:width|height|depth)$/.test(length) || /^(?:100|[1-9]?\d)%$/.test(length)) return length;
  const match = /^([+-]?)(\d+(?:\.\d*)?|\.\d+)(em|ex|pt|px|mu|)$/.exec(length);
  if (match === null) return "0";
  const [, sign, digits, unit] = match;
  const size = Number(digits) * EM.get(unit!)!;
  const most = sign === "-" ? back : forward;
  return size <= most ? length : `${sign}${most}em`;
}

/** Of `padding` or `margin`: above, right, below and left, or fewer. */
function boundSides(name: string, lengths: string): string {
  const isAcross = /-(?:left|right)$/.test(name);
  return lengths
    .split(/\s+/)
    .slice(0, 4)
    .map((each, i) => bound(each, isAcross || i % 2 ? LIMITS.width : LIMITS.height))
    .join(" ");
}

/** The declarations of a style that Temml needs: no fixed positions, no foreign layers. */
function boundStyle(style: string): string {
  return style
    .split(";")
    .flatMap((each) => {
      const [name = "", value = ""] = each.split(":").map((part) => part.trim());
      if (/^(?:padding|margin)(?:-(?:top|right|bottom|left))?$/.test(name)) return [`${name}:${boundSides(name, value)}`];
      if (name === "width") return [`${name}:${bound(value, LIMITS.width)}`];
      if (/^(?:color|background-color|border(?:-(?:top|right|bottom|left)?(?:-color|-style)?)?)$/.test(name)) {
        const plain = value.replace(/[\d.]+(?:em|ex|pt|px)/g, (length) => bound(length, LIMITS.thickness));
        return /^[\w#.,%() -]*$/.test(plain) && !plain.includes("url") ? [`${name}:${plain}`] : [];
      }
      const isKnown = /^(?:position:(?:relative|absolute)|(?:right|left|bottom|top):0|display:(?:flex|inline-block)|justify-content:\w+|text-align:[\w-]+|math-depth:0)$/;
      return isKnown.test(`${name}:${value}`) ? [`${name}:${value}`] : [];
    })
    .join(";");
}

/** Temml's MathML with bounded lengths. Throws if it is too long or too deep. */
export function bounded(mathml: string): string {
  if (mathml.length > MAX_MATHML) throw new RangeError("formula too long");
  let depth = 0;
  return mathml.replace(/<(\/?)(\w+)([^<>]*)>/g, (_, end: string, name: string, attributes: string) => {
    if (end) depth--;
    else if (!attributes.endsWith("/") && ++depth > MAX_DEPTH) throw new RangeError("formula too deep");
    const rest = attributes.replace(/ ([\w-]+)="([^"]*)"/g, (whole, key: string, value: string) => {
      // The Content-Security-Policy forbids style attributes, even in text that is about to be sanitized.
      if (key === "style") return ` data-css="${boundStyle(value)}"`;
      const limit = ATTRIBUTES.get(key);
      return limit === undefined ? whole : ` ${key}="${bound(value, limit)}"`;
    });
    return `<${end}${name}${rest}>`;
  });
}
