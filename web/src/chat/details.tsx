import { Dialog } from "../components/dialog";
import { number, t } from "../i18n";
import type { Node } from "../tree";
import { FIELDS } from "./sampling";
import { usage } from "./state";

/** How an answer was generated. */
export function Details(props: { node: Node; onClose: () => void }) {
  const { node } = props;
  const stats = usage.value.get(node.id);
  const sampling = node.sampling ?? {};
  const rows: [string, string][] = [[t("model"), node.model ?? "–"]];
  if (typeof sampling.thinking === "boolean") rows.push([t("thinkingSwitch"), t(sampling.thinking ? "on" : "off")]);
  for (const { name, label, neutral } of FIELDS) {
    const value = sampling[name];
    const shown = typeof value === "number" ? value : name === "thinking_budget" ? null : neutral;
    if (shown !== null) rows.push([t(label), String(shown)]);
  }
  if (stats) {
    rows.push([t("promptTokens"), number(stats.usage.prompt_tokens)]);
    rows.push([t("answerTokens"), number(stats.usage.completion_tokens)]);
    rows.push([t("seconds"), number(stats.seconds, 1)]);
  }
  return (
    <Dialog title={t("answerDetails")} onClose={props.onClose}>
      <dl class="details">
        {rows.map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
    </Dialog>
  );
}
