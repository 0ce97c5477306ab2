import { useSignal } from "@preact/signals";
import { Dialog } from "../components/dialog";
import { Icon } from "../components/icons";
import { number, t } from "../i18n";
import { subtree, turn, without, withoutTurn, type Conversation, type Node } from "../tree";
import { remove, update } from "./persistence";
import { current, generating } from "./state";

/** Deletes an answer or a turn, and what follows it on request; asks before. */
export function DeleteMessage(props: { node: Node }) {
  const asking = useSignal(false);
  const title = t("deleteMessage");
  return (
    <>
      <button
        type="button"
        class="quiet"
        aria-label={title}
        title={title}
        disabled={generating.value}
        onClick={() => (asking.value = true)}
      >
        <Icon name="trash" />
      </button>
      {asking.value && <Choices node={props.node} onClose={() => (asking.value = false)} />}
    </>
  );
}

function Choices(props: { node: Node; onClose: () => void }) {
  const { node, onClose } = props;
  const conversation = current.value;
  const below = subtree(conversation, node.id).size;
  const inTurn = node.role === "user" ? turn(conversation, node.id).size : 1;
  const apply = (change: (before: Conversation, id: string) => Conversation) => {
    onClose();
    const { nodes, selected } = change(current.value, node.id);
    if (nodes.length) update({ nodes, selected });
    else void remove(conversation.id);
  };
  return (
    <Dialog title={t("deleteMessage")} onClose={onClose}>
      <p class="excerpt">{node.content.slice(0, 300)}</p>
      <p class="note">{t("deletionIsFinal")}</p>
      <div class="choices">
        {node.role === "user" && (
          <button type="button" class="danger" onClick={() => apply(withoutTurn)}>
            {t("deleteTurn", { n: number(inTurn) })}
          </button>
        )}
        {node.role === "assistant" && below === 1 && (
          <button type="button" class="danger" onClick={() => apply(without)}>
            {t("deleteAnswer")}
          </button>
        )}
        {below > inTurn && (
          <button type="button" class="danger" onClick={() => apply(without)}>
            {t("deleteFromHere", { n: number(below) })}
          </button>
        )}
        <button type="button" onClick={onClose}>
          {t("cancel")}
        </button>
      </div>
    </Dialog>
  );
}
